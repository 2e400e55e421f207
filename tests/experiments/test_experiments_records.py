"""Raw records are read back as they were written; errors name the file and line."""

from pathlib import Path

import pytest
from experiment_samples import dead_letter, made_runs, response, run_of

from core.errors import UserError
from experiments.provenance import provenance
from experiments.records import read_runs, write_run


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    runs = made_runs(12)
    for run in reversed(runs):
        write_run(tmp_path, run)
    assert read_runs(tmp_path) == runs


def test_any_text_and_dead_letters_survive(tmp_path: Path) -> None:
    odd = response(text='line\nbreak \u2028 "quoted" \\ ü 😀\x00', token_ids=(3, 4))
    run = run_of(odd, dead_letters=(dead_letter(request_id="q"), dead_letter()), failures=("it broke",))
    write_run(tmp_path, run)
    assert read_runs(tmp_path) == [run]


def test_a_run_without_a_manifest_is_not_complete(tmp_path: Path) -> None:
    for run in made_runs(4):
        write_run(tmp_path, run)
    (tmp_path / "fluid.manifest.json").unlink()
    assert [run.manifest.variant for run in read_runs(tmp_path)] == ["STATIC", "FREQUENCY", "MRC"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not one JSON object"),
        ("[]", "line 2: not one JSON object"),
        ('{"sent": {}, "response": {}}', "line 2: not one JSON object"),
        ('{"reply": {}}', "line 2: 'reply' is not a kind"),
        ('{"sent": {"request_id": "a"}}', "line 2: session_id: missing"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = write_run(tmp_path, run_of(response()))
    first, *_ = path.read_text().splitlines()
    path.write_text(f"{first}\n{line}\n")
    with pytest.raises(UserError, match=said):
        read_runs(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        read_runs(tmp_path / "none")
    with pytest.raises(UserError, match="holds no"):
        read_runs(tmp_path)
    write_run(tmp_path, run_of(response())).unlink()
    with pytest.raises(UserError, match="is missing beside its manifest"):
        read_runs(tmp_path)


def test_provenance_says_where_and_with_what() -> None:
    found = provenance()
    assert found.machine["cores"] >= 1
    assert found.versions["apache-flink"].startswith("2.")
