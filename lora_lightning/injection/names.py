"""Names of modules as the user wrote them, whatever has been wrapped around them since, and the root they start at."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")


def canonical(name: str) -> str:
    """A name without the parts that torch.compile, FSDP and activation checkpointing put into it.

    >>> canonical("net._orig_mod.fc.weight")
    'net.fc.weight'
    >>> canonical("_orig_mod.fc")
    'fc'
    """
    return _WRAPPERS.sub("", name).removeprefix(".")


def canonical_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below (and with) ``model`` once, by canonical name; a wrapper counts as its content."""
    seen: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        seen[canonical(name)] = module  # the content comes after its wrapper and takes the name
    yield from seen.items()


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's, FSDP's or DDP's wrapper, if ``model`` is one."""
    for name in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        if isinstance(inner := model._modules.get(name), nn.Module):
            return unwrap(inner)
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return unwrap(model.module)
    return model


def find_root(model: nn.Module) -> tuple[str, nn.Module]:
    """The module that patterns, heads and keys in files are relative to, with its canonical name below ``model``.

    It is the one outermost submodule that has ``get_output_embeddings`` (a transformers model, wherever it sits), or
    the module itself where there is none or more than one.
    """
    model = unwrap(model)
    found: list[tuple[str, nn.Module]] = []
    for name, module in canonical_modules(model):
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer, _ in found)
        if not inside and callable(getattr(module, "get_output_embeddings", None)):
            found.append((name, module))
    return found[0] if len(found) == 1 else ("", model)
