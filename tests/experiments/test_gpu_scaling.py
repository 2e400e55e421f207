"""The scaling experiment's result file and figure, from given records."""

from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest
from experiment_samples import dead_letter, made_scaling_run, made_scaling_runs, run_of

from experiments.figures import four_panels, head
from experiments.report import notes as shared_notes
from experiments.report import write_csv
from experiments.scaling_figure import scaling_figure
from experiments.scaling_metrics import COLUMNS, SHOWN, gpu_distribution, notes, table

SEED_HEADER = "parallelism,total_throughput,scale_factor,gpu_distribution,execution_time"


def test_the_csv_has_the_seeds_header_first_and_a_row_a_run(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_csv(table(made_scaling_runs()), path)
    header, *rows = path.read_text().splitlines()
    assert header == ",".join(COLUMNS)
    assert header.startswith(SEED_HEADER + ",")
    assert [line.split(",")[0] for line in rows] == ["1", "2", "4"]
    assert {name for _, name, _ in SHOWN} <= set(COLUMNS)


def test_scaling_is_relative_to_the_smallest_parallelism() -> None:
    # 48 requests of 500, 525 and 575 ms.
    results = table(made_scaling_runs())
    assert list(results["execution_time"]) == pytest.approx([24.0, 12.6, 6.9])
    assert list(results["total_throughput"]) == pytest.approx([48 / 24, 48 / 12.6, 48 / 6.9])
    assert list(results["scale_factor"]) == pytest.approx([1, 24 / 12.6, 24 / 6.9])
    assert list(results["efficiency"]) == pytest.approx([1, 12 / 12.6, 6 / 6.9])
    assert list(results["utilisation_percent"]) == pytest.approx([100] * 3)
    turned = table(made_scaling_runs()[:0:-1])
    assert list(turned["parallelism"]) == [4, 2]
    assert list(turned["efficiency"]) == pytest.approx([12.6 / 2 / 6.9, 1])


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cpu", "CPU0:12;CPU1:12;CPU2:12;CPU3:12"),
        ("simulated:{slot}", "SIM0:12;SIM1:12;SIM2:12;SIM3:12"),
        ("cuda:{slot}", "GPU0:12;GPU1:12;GPU2:12;GPU3:12"),
        ("cuda:0", "GPU0:48"),
        ("cuda", "GPU0:48"),
    ],
)
def test_requests_are_counted_by_device(device: str, said: str) -> None:
    assert gpu_distribution(made_scaling_run(4, 0, device)) == said


def test_a_device_without_requests_is_there_too_and_ten_comes_after_nine() -> None:
    distribution = gpu_distribution(made_scaling_run(12, 0, "cuda:{slot}", requests=3))
    assert distribution == ";".join(f"GPU{slot}:{int(slot < 3)}" for slot in range(12))
    results = table([made_scaling_run(4, 0, requests=3)])
    assert (results["min_device_requests"][0], results["max_device_requests"][0], results["devices"][0]) == (0, 1, 4)


def test_it_is_said_what_scales() -> None:
    (said,) = notes(made_scaling_runs())
    assert "2 cores" in said
    assert "threads of a slot: 1" in said
    assert notes(made_scaling_runs("cuda:{slot}")) == []
    assert [line.split(":")[0] for line in notes(made_scaling_runs("cuda:0"))] == ["parallelism_2", "parallelism_4"]


def test_what_is_simulated_says_so(tmp_path: Path) -> None:
    simulated = made_scaling_runs("simulated:{slot}")
    assert shared_notes(simulated)[0].startswith("The engine is simulated")
    assert notes(simulated) == []
    for runs, title in ((simulated, "t: a simulated device"), (made_scaling_runs(), "t")):
        with four_panels(tmp_path / "a.png") as (figure, _):
            head(figure, "t", runs, ["black"] * len(runs), "")
            assert figure.get_suptitle() == title


def test_a_run_without_answers_is_a_row_of_empty_cells() -> None:
    empty = made_scaling_run(2, 1, requests=0)
    results = table([made_scaling_run(1, 0), empty])
    assert list(results["total_requests"]) == [48, 0]
    assert pd.isna(results["scale_factor"][1])
    assert results["gpu_distribution"][1] == "CPU0:0;CPU1:0"


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_figure_shows_every_run(tmp_path: Path, device: str) -> None:
    path = tmp_path / "a.png"
    scaling_figure(made_scaling_runs(device), path)
    image = matplotlib.image.imread(path)[..., :3]
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        distance = abs(image - [part / 255 for part in colour]).max(axis=2)
        assert (distance < 0.01).sum() > 3000, colour


def test_many_devices_and_a_single_run_can_be_drawn_too(tmp_path: Path) -> None:
    many = [made_scaling_run(slots, position, "cuda:{slot}", 256) for position, slots in enumerate((8, 64))]
    scaling_figure(many, tmp_path / "many.png")
    scaling_figure(made_scaling_runs()[:1], tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="nothing to draw"):
        scaling_figure([run_of(dead_letters=(dead_letter(),))], tmp_path / "none.png")
