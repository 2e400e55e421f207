"""A model that does not fit is refused before it is loaded, with the names of the options to lower."""

from pathlib import Path

import pytest
import torch
from engine_helpers import load_tiny
from safetensors.torch import save_file

from core.errors import UserError
from inference_service import memory
from inference_service.config import EngineConfig
from inference_service.kv_pool import KVPool
from inference_service.memory import check_memory, weight_bytes
from inference_service.model import load_model, resolve_dtype

GIB = 1 << 30
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes by type of device, which a test may change."""
    found = {"cpu": 4 * GIB, "cuda": 2 * GIB}
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: found["cpu"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (found["cuda"], 10 * GIB))
    return found


def refusal(weights: int, pool: int, dtype: torch.dtype, device: torch.device) -> str:
    with pytest.raises(UserError) as caught:
        check_memory("m", weights, pool, dtype, device)
    return str(caught.value)


def test_weights_and_rows_must_fit_together(free: dict[str, int]) -> None:
    check_memory("m", 3 * GIB, GIB, torch.float32, CPU)
    assert refusal(3 * GIB, GIB + 1, torch.float32, CPU) == (
        "model: 'm' needs 4.00 GiB on cpu, 3.00 GiB for its weights (float32) and 1.00 GiB for the key/value rows, and "
        "4.00 GiB are free; lower --max-model-len, --max-running or --parallelism, or take --dtype bfloat16"
    )
    check_memory("m", GIB, GIB, torch.bfloat16, GPU)
    assert refusal(GIB, GIB + 1, torch.bfloat16, GPU).endswith(
        " and 2.00 GiB are free; lower --max-model-len, --max-running or --parallelism"
    )
    free["cpu"] = GIB - 1
    assert refusal(GIB, GIB, torch.bfloat16, GPU) == (
        "model: the weights of 'm' reach cuda:0 by way of 1.00 GiB of the host's memory, of which 1.00 GiB are free; "
        "lower --parallelism"
    )


def test_what_a_model_needs_is_known_before_it_is_loaded(tiny_paths: dict[str, Path], free: dict[str, int]) -> None:
    for name, path in tiny_paths.items():
        free["cpu"] = 4 * GIB
        config = EngineConfig(model=str(path), device="cpu", max_running=5, max_model_len=64)
        model = load_model(config)
        weights = sum(weight.numel() for weight in model.model.parameters()) * 4
        assert weight_bytes(str(path), torch.float32) == weights
        assert weight_bytes(str(path), torch.bfloat16) == weights // 2
        pool = KVPool(model.chunk_shape(8), 5, model.max_len, CPU).size_bytes
        free["cpu"] = weights + pool
        assert load_model(config).name == name
        free["cpu"] -= 1
        with pytest.raises(UserError, match=rf"^model: '{name}' needs .* lower --max-model-len, --max-running or "):
            load_model(config)


def test_weights_of_several_files_and_other_formats_are_counted(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(10, 3), "b": torch.zeros(7, dtype=torch.int32)}, tmp_path / "one.safetensors")
    save_file(
        {"c": torch.zeros(5, dtype=torch.uint8), "d": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "two.st"
    )
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.st", "d": "two.st"}}'
    )
    assert weight_bytes(str(tmp_path), torch.bfloat16) == 30 * 2 + 7 * 4 + 5 + 2
    (tmp_path / "empty").mkdir()
    assert weight_bytes(str(tmp_path / "empty"), torch.bfloat16) == 0


def test_an_allocator_that_has_no_room_after_all_is_the_users_error(
    tiny_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = load_tiny(tiny_paths["qwen2"])
    monkeypatch.setattr("inference_service.model.KVPool", no_room)
    with pytest.raises(UserError) as caught:
        model.make_runner(4, 8)
    assert str(caught.value) == (
        "model: cpu has no 0.00 GiB left for the key/value rows of 'qwen2'; lower --max-model-len, --max-running or "
        "--parallelism"
    )


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_auto_is_the_checkpoints_dtype_on_a_gpu_alone(stored: str, tiny_paths: dict[str, Path]) -> None:
    config = load_tiny(tiny_paths["qwen2"]).model.config
    config.dtype = getattr(torch, stored)
    assert resolve_dtype("auto", GPU, config) == config.dtype
    assert resolve_dtype("auto", CPU, config) == torch.float32
    assert resolve_dtype("float16", GPU, config) == resolve_dtype("float16", CPU, config) == torch.float16
    config.dtype = None
    assert resolve_dtype("auto", GPU, config) == torch.float32
