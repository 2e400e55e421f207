"""Tenants and models never find each other's chunks; a test with equal keys shows that a failure would be seen."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import foreign_chunks
from cache import keys

LOOKUPS = 10_000


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lookups: int) -> tuple[int, dict[str, int]]:
    """Run the command; return exit status and figures."""
    out = tmp_path / "foreign_chunks.json"
    monkeypatch.setattr(sys, "argv", ["foreign_chunks", f"--lookups={lookups}", f"--out={out}"])
    with pytest.raises(SystemExit) as ended:
        foreign_chunks.main()
    return ended.value.code, json.loads(out.read_text())["figures"]


def test_no_chunk_is_foreign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, figures = run(monkeypatch, tmp_path, LOOKUPS)
    assert (status, figures["foreign_chunks"]) == (0, 0)
    assert figures["lookups"] == LOOKUPS
    assert figures["lookups_of_nothing"] > LOOKUPS / 3
    # An empty cache, or one that has every chunk, would prove nothing.
    assert min(figures["local_chunks"], figures["remote_chunks"], figures["chunks_stored"]) > LOOKUPS / 20
    assert figures["evictions"] > LOOKUPS / 20
    assert (figures["remote_corrupt"], figures["remote_errors"]) == (0, 0)


@pytest.mark.parametrize("forgotten", ["salt", "weights", "tokenizer", "settings", "adapter", "seal"])
def test_keys_that_leave_one_thing_out_show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forgotten: str) -> None:
    tagged = keys._tagged
    monkeypatch.setattr(keys, "_tagged", lambda tag, value: b"" if tag == forgotten else tagged(tag, value))
    status, figures = run(monkeypatch, tmp_path, 1000)
    # A chunk sealed with another key is treated as damaged.
    shown = figures["remote_corrupt"] if forgotten == "seal" else figures["foreign_chunks"]
    assert shown > 0
    assert status == (0 if forgotten == "seal" else 1)
