"""The benchmark of a slow Redis end to end on a tiny model."""

import json
import math
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from test_kv_reuse import tiny_model  # noqa: F401 - a fixture

from benchmarks import redis_stall
from benchmarks.delaying_proxy import delayed
from benchmarks.redis_stall import StallProbe, figures_of, p99
from benchmarks.reuse_probe import WrongMeasurementError
from core.errors import UserError

OPTIONS = (
    "--rounds=2",
    "--delay-ms=2",
    "--running=2",
    "--output-tokens=12",
    "--group=2",
    "--group-every-steps=5",
    "--device=cpu",
    "--max-running=4",
)


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["redis_stall", *OPTIONS, *options])
    redis_stall.main()


def test_the_result_is_complete(
    tiny_model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "redis_stall.json"
    run(monkeypatch, f"--model={tiny_model}", f"--out={out}", f"--threads={torch.get_num_threads()}")
    report = json.loads(out.read_text())
    figures = report["figures"]
    assert all(math.isfinite(value) for value in figures.values())
    for name in ("no_cache", "unknown", "known"):
        assert 0 < figures[f"gap_p50_ms_{name}"] <= figures[f"gap_p99_ms_{name}"] <= figures[f"gap_max_ms_{name}"]
        assert len(report["samples"][f"gap_p99_ms_{name}"]) == 2
    assert figures["gap_p99_over_no_cache"] > 0
    assert report["settings"]["delay_ms"] == 2
    assert "p99 over that without a cache" in capsys.readouterr().out


def test_ratios_are_taken_round_by_round() -> None:
    samples = {f"{kind}_{name}": [1.0, 2.0] for kind in ("gap_p50_ms", "gap_max_ms") for name in redis_stall.RUNS}
    samples |= {"gap_p99_ms_no_cache": [1.0, 4.0], "gap_p99_ms_unknown": [1.0, 8.0], "gap_p99_ms_known": [1.0, 4.0]}
    figures = figures_of(samples)
    assert (figures["gap_p99_over_no_cache"], figures["gap_p99_over_no_cache_known"]) == (1.5, 1.0)
    assert p99([float(value) for value in range(101)]) == 99.0


def test_a_run_in_which_redis_does_not_hold_the_prompts_ends_the_benchmark(
    tiny_model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StallProbe, "_fill_redis", lambda probe, prompts: None)
    with pytest.raises(WrongMeasurementError, match="of 4 prompts were found in Redis"):
        run(monkeypatch, f"--model={tiny_model}", f"--out={tmp_path / 'x.json'}")
    assert not (tmp_path / "x.json").exists()


def test_a_prompt_of_no_full_chunks_is_a_users_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--prompt-tokens: give a multiple of the 32"):
        run(monkeypatch, "--prompt-tokens=33", f"--out={tmp_path / 'x.json'}")


def test_the_proxy_delays_answers_and_keeps_them_whole() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, delayed(server.getsockname()[1], 30.0) as port:
        with socket.create_connection(("127.0.0.1", port), 20) as client:
            behind, _ = server.accept()
            client.sendall(b"ask")
            assert behind.recv(3) == b"ask"
            sent = bytes(range(256)) * 4096
            began_s = time.monotonic()
            behind.sendall(sent)
            behind.close()
            answer = b""
            while piece := client.recv(1 << 16):
                answer += piece
            assert time.monotonic() - began_s >= 0.030
        assert answer == sent


def test_too_few_rows_for_a_group_to_begin_are_a_users_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--max-running: give at least 4, so that a group can begin"):
        run(monkeypatch, "--max-running=3", f"--out={tmp_path / 'x.json'}")
