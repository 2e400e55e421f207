"""Refuses a model before loading if its weights and key/value rows do not fit into free memory."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from core.errors import UserError
from core.machine import free_memory_bytes

GIB = 1 << 30
_FLOATS = {"F64", "F32", "F16", "BF16"}


def weight_bytes(source: str, dtype: torch.dtype) -> int:
    """Memory that the weights of a folder, or of a name of the hub, will take; 0 if unknown.

    It is computed from the headers of the safetensors files. Floating-point weights are loaded as `dtype`. Others, such
    as quantized ones, keep their size.
    """
    total = 0
    for file in _weight_files(source):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no mapping
                tensor = weights.get_slice(name)
                numbers = torch.Size(tensor.get_shape()).numel()
                stored = tensor.get_dtype()
                total += numbers * (dtype.itemsize if stored in _FLOATS else _stored_bytes(stored))
    return total


def check_memory(name: str, weights: int, pool: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises `UserError` that names the options to lower if the model does not fit.

    `weights`: bytes of the weights, 0 if unknown; `pool`: bytes of the key/value rows.
    """
    if weights + pool > (free := _free_bytes(device)):
        dtypes = ", or take --dtype bfloat16" if dtype == torch.float32 else ""
        raise UserError(
            f"model: {name!r} needs {_gib(weights + pool)} on {device}, {_gib(weights)} for its weights "
            f"({_name(dtype)}) and {_gib(pool)} for the key/value rows, and {_gib(free)} are free; lower "
            f"--max-model-len, --max-running or --parallelism{dtypes}"
        )
    if device.type != "cpu" and weights > (free := _free_bytes(torch.device("cpu"))):
        raise UserError(
            f"model: the weights of {name!r} reach {device} by way of {_gib(weights)} of the host's memory, of which "
            f"{_gib(free)} are free; lower --parallelism"
        )


def no_room_for_rows(name: str, pool: int, device: torch.device) -> UserError:
    """The error for an allocation of `pool` bytes that failed although the check had passed."""
    return UserError(
        f"model: {device} has no {_gib(pool)} left for the key/value rows of {name!r}; lower --max-model-len, "
        "--max-running or --parallelism"
    )


def _weight_files(source: str) -> list[Path]:
    """The files of the weights that are on this machine."""
    index, single = (
        cached_file(
            source,
            name,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
    )
    if single is not None:
        return [Path(single)]
    if index is None:
        return []
    names = set(json.loads(Path(index).read_text())["weight_map"].values())
    files = [Path(index).with_name(name) for name in sorted(names)]
    return [file for file in files if file.exists()]


def _stored_bytes(stored: str) -> int:
    """Bytes of a number in a format of safetensors, whose name ends with its bits: I64, U8, F8_E4M3."""
    bits = "".join(filter(str.isdigit, stored.partition("_")[0]))
    return max(1, int(bits or 8) // 8)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory_bytes()


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
