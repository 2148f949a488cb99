"""Safetensors files, written from the tensors' own memory and read out of a memory map: no copy of a whole file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lora_lightning.adapters.written import written_aside
from lora_lightning.errors import AdapterError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that any reader reads; it is written aside and renamed.

    safetensors' own ``save`` makes the whole file in memory first, and its ``save_file`` one that only its owner may
    read. Here each tensor goes from where it lies straight into the file; one on a GPU, or not contiguous, by way of a
    copy of it alone. Format: github.com/huggingface/safetensors, "Format".

    Raises:
        AdapterError: A tensor has a dtype that the format lacks.
    """
    ordered = _in_order(tensors)
    header = _header(ordered)
    with written_aside(path) as file:
        file.write(header)
        for value in ordered.values():
            file.write(value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """How large the file of `write_tensors` would be; tensors without numbers (meta, fake) do as well.

    Raises:
        AdapterError: As `write_tensors`.
    """
    return len(_header(_in_order(tensors))) + sum(value.numel() * value.element_size() for value in tensors.values())


def _in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wide numbers first, so that each tensor is aligned."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))


def _header(ordered: Mapping[str, Tensor]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in ordered.items():
        if value.dtype not in _DTYPES:
            raise AdapterError(f"{name} is of {value.dtype}, which safetensors files do not hold")
        begin, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    told = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    told += b" " * (-len(told) % 8)
    return len(told).to_bytes(8, "little") + told


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name. They lie in a memory map: what is not looked at is not read.

    Raises:
        AdapterError: The file is damaged, or holds a NaN or an infinity.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if bad := sorted(name for name, value in tensors.items() if not is_finite(value)):
        raise AdapterError(f"{path} holds values that are not finite (NaN or infinity) in {', '.join(bad[:4])}")
    return tensors


def names_in(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file; only its header is read.

    Raises:
        AdapterError: The file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def is_finite(value: Tensor) -> bool:
    """Whether no element is a NaN or an infinity, in one pass without a temporary of its size.

    >>> is_finite(torch.tensor([1.0, float("nan")])), is_finite(torch.ones(2)), is_finite(torch.empty(0))
    (False, True, True)
    """
    if not value.is_floating_point() or not value.numel():
        return True
    return bool(torch.stack(torch.aminmax(value.detach())).isfinite().all())  # both are NaN where any element is


def _damaged(path: Path, error: Exception) -> AdapterError:
    return AdapterError(f"{path} cannot be read, it is damaged or was cut off: {error}")
