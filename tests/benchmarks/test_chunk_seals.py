"""The benchmark of authenticated chunks, end to end."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import chunk_seals
from cache.protocol import ChunkShape


def test_the_result_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "chunk_seals.json"
    monkeypatch.setattr(chunk_seals, "SHAPES", {"tiny": ChunkShape(1, 1, 4, 4, torch.float32)})
    monkeypatch.setattr(sys, "argv", ["chunk_seals", "--rounds=3", "--chunks=2", f"--out={out}"])
    chunk_seals.main()
    report = json.loads(out.read_text())
    assert all(math.isfinite(value) and value > 0 for name, value in report["figures"].items() if "ms" in name)
    assert report["figures"]["chunk_bytes_tiny"] == 2 * 4 * 4 * 4
    assert {len(values) for values in report["samples"].values()} == {3}
    assert len(report["samples"]) == 4
    ratio = sorted(
        a / b
        for a, b in zip(
            report["samples"]["seal_ms_authentication_tiny"], report["samples"]["seal_ms_checksum_tiny"], strict=True
        )
    )[1]
    assert report["figures"]["seal_ratio_tiny"] == pytest.approx(ratio, abs=1e-4)
    assert "tiny" in capsys.readouterr().out
