"""Which floating-point type the weights are loaded in: 16 bits only where the machine computes them natively."""

from __future__ import annotations

import torch

# Probes of torch.cpu; not every supported torch has both.
_CPU_BF16_PROBES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def likely_device() -> torch.device:
    """The device a Trainer takes when it is not told: the GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device computes in a type by itself rather than by emulation."""
    if dtype not in (torch.bfloat16, torch.float16) or device.type not in ("cpu", "cuda"):
        return True
    if device.type == "cuda":
        return dtype is torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype is torch.float16:
        return False
    return any(getattr(torch.cpu, probe)() for probe in _CPU_BF16_PROBES if hasattr(torch.cpu, probe))


def pick_dtype(requested: str, stored: torch.dtype | None, device: torch.device) -> tuple[torch.dtype, str]:
    """Decide on the type of the weights.

    Args:
        requested: ``auto`` or the name of a torch dtype.
        stored: The type the checkpoint was saved in, as far as its config says.
        device: Where the model is to train.

    Returns:
        The type, and the reason for it where it is worth telling, else an empty string.

    >>> pick_dtype("auto", torch.float16, torch.device("cpu"))[0]
    torch.float32
    """
    wanted = (stored or torch.float32) if requested == "auto" else getattr(torch, requested)
    if is_native(wanted, device):
        return wanted, ""
    name, place = str(wanted).removeprefix("torch."), "this GPU" if device.type == "cuda" else "this CPU"
    if requested == "auto":
        return torch.float32, f"weights are loaded as float32: they were saved as {name}, which {place} only emulates"
    return wanted, f"{name} was asked for, but {place} only emulates it, about ten times slower than dtype=float32"
