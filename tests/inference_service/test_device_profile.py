"""The roofline of a device: its formulas by hand, and its profile files."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from inference_service.device_profile import DeviceProfile

ROUND_NUMBERS: dict[str, Any] = {
    "device": "a device",
    "model": "Toy",
    "dtype": "bfloat16",
    "measured": False,
    "source": "round numbers",
    "parameters": 600,
    "layers": 2,
    "kv_heads": 2,
    "head_dim": 4,
    "vocab_size": 500,
    "max_model_len": 128,
    "weight_bytes": 10_000,
    "kv_bytes_per_token": 64,
    "flops_per_token": 1000,
    "head_flops": 200,
    "attention_flops": 32,
    "flops_per_s": 1e6,
    "bytes_per_s": 1e6,
    "kv_bytes_per_s": 5e5,
    "prefill_overhead_ms": 3.0,
    "decode_overhead_ms": 2.0,
    "decode_row_overhead_ms": 0.5,
}
PROFILE = DeviceProfile(**ROUND_NUMBERS)


def test_a_long_prefill_takes_the_time_of_its_arithmetic() -> None:
    # 100 tokens attend to 1 + 2 + ... + 100 tokens.
    flops = 100 * 1000 + 200 + 32 * 5050
    assert PROFILE.prefill_ms(100, 0) == pytest.approx(3.0 + flops / 1e3)


def test_a_short_prefill_takes_the_time_to_read_weights_and_row() -> None:
    assert PROFILE.prefill_ms(1, 9) == pytest.approx(3.0 + 10_000 / 1e3 + 64 * 10 / 500)


def test_a_prompt_in_two_pieces_is_the_same_arithmetic() -> None:
    whole = PROFILE.prefill_ms(100, 0)
    pieces = PROFILE.prefill_ms(60, 0) + PROFILE.prefill_ms(40, 60)
    # Two passes pay twice for the overhead of a pass, and for the logits after its last token.
    assert pieces - whole == pytest.approx(3.0 + 200 / 1e3)


def test_a_decode_step_reads_weights_once_and_every_row_up_to_the_longest() -> None:
    assert PROFILE.decode_ms([9]) == pytest.approx(2.5 + 10_000 / 1e3 + 64 * 10 / 500)
    assert PROFILE.decode_ms([2, 9, 4]) == pytest.approx(3.5 + 10_000 / 1e3 + 64 * 30 / 500)


def test_a_decode_step_of_many_rows_takes_the_time_of_its_arithmetic() -> None:
    assert PROFILE.decode_ms([0] * 50) == pytest.approx(27.0 + 50 * (1000 + 200 + 32) / 1e3)


def test_a_pass_over_rows_and_prompts_reads_weights_once_and_each_row_once() -> None:
    arithmetic = (3 + 4 + 1) * 1000 + (3 + 2) * 200 + 32 * (3 * 10 + (4 * 2 + 10) + 10)
    read = 64 * (3 * 10 + 6 + 10)
    assert PROFILE.pass_ms([2, 9, 4], [(4, 2), (1, 9)]) == pytest.approx(
        max(2.0, 3.0) + 1.5 + max(arithmetic / 1e3, 10_000 / 1e3 + read / 500)
    )


def test_a_rate_of_none_takes_no_time() -> None:
    arithmetic_only = PROFILE.model_copy(update={"bytes_per_s": None, "kv_bytes_per_s": None})
    assert arithmetic_only.decode_ms([9]) == pytest.approx(2.5 + (1000 + 200 + 320) / 1e3)


def test_the_instant_device_takes_no_time_and_goes_through_json(tmp_path: Path) -> None:
    path = tmp_path / "instant.json"
    path.write_text(DeviceProfile.instant().model_dump_json())
    profile = DeviceProfile.read(path)
    assert profile == DeviceProfile.instant()
    assert profile.prefill_ms(10_000, 500) == 0
    assert profile.decode_ms([10_000] * 64) == 0


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "No such file"),
        ("not json", "JSON"),
        (json.dumps(ROUND_NUMBERS | {"flops_per_s": 0.0}), "flops_per_s"),
        (json.dumps(ROUND_NUMBERS | {"decode_overhead_ms": -1.0}), "decode_overhead_ms"),
        (json.dumps({name: ROUND_NUMBERS[name] for name in ROUND_NUMBERS if name != "layers"}), "layers: missing"),
        (json.dumps(ROUND_NUMBERS | {"speed": 1.0}), "speed: unknown field"),
    ],
    ids=["missing file", "not json", "rate of zero", "negative overhead", "missing field", "unknown field"],
)
def test_a_broken_profile_is_refused_in_one_line(tmp_path: Path, content: str | None, named: str) -> None:
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as refused:
        DeviceProfile.read(path)
    line = str(refused.value)
    assert line.startswith("--profile: ")
    assert str(path) in line
    assert named in line
    assert "\n" not in line
