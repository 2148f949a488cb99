"""Names of modules as the user wrote them, whatever has been wrapped around them since, and the root they start at."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar

from torch import nn

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Modules by canonical name, and all of them, wrappers too.
_Walk = tuple[dict[str, nn.Module], list[nn.Module]]
# Walks that are remembered, by the module that they began at; None where the tree may change between two of them.
_WALKS: ContextVar[dict[int, _Walk] | None] = ContextVar("walks", default=None)
_IN_NAMES = re.compile(rf"(^|\.)({'|'.join(_WRAPPERS)})(?=\.|$)")


def canonical(name: str) -> str:
    """A name without the parts that torch.compile, FSDP and activation checkpointing put into it.

    >>> canonical("net._orig_mod.fc.weight")
    'net.fc.weight'
    >>> canonical("_orig_mod.fc")
    'fc'
    """
    return _IN_NAMES.sub("", name).removeprefix(".")


def canonical_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below (and with) ``model`` once, by canonical name; a wrapper counts as its content."""
    yield from _walked(model)[0].items()


def parameters_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """What ``model.parameters()`` gives."""
    seen: set[int] = set()
    for module in _walked(model)[1]:
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


@contextlib.contextmanager
def walked_once() -> Iterator[None]:
    """Walk a model once inside the ``with`` block, however many ask for its modules.

    For work that changes the modules' classes and parameters; where it adds a module or takes one away, it says so
    with :func:`forget_walks`.
    """
    before = _WALKS.set({} if _WALKS.get() is None else _WALKS.get())
    try:
        yield
    finally:
        _WALKS.reset(before)


def forget_walks() -> None:
    """Walk anew inside :func:`walked_once`: modules have been added or taken away."""
    if (known := _WALKS.get()) is not None:
        known.clear()


def _walked(model: nn.Module) -> _Walk:
    known = _WALKS.get()
    if known is None:
        return _walk(model)
    if id(model) not in known:
        known[id(model)] = _walk(model)
    return known[id(model)]


def _walk(model: nn.Module) -> _Walk:
    """Modules in the order of ``named_modules``, without a generator for every level of depth."""
    found: dict[str, nn.Module] = {}
    visited: dict[int, nn.Module] = {}
    ahead = [("", model)]
    while ahead:
        name, module = ahead.pop()
        if id(module) in visited:
            continue
        visited[id(module)] = module
        found[name] = module  # the content comes after its wrapper and takes the name
        if children := module._modules:
            before = f"{name}." if name else ""
            for local, child in reversed(list(children.items())):
                if child is not None:
                    ahead.append((name if local in _WRAPPERS else before + local, child))
    return found, list(visited.values())


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's, FSDP's or DDP's wrapper, if ``model`` is one."""
    for name in _WRAPPERS:
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
    inside: tuple[str, ...] = ()
    for name, module in canonical_modules(model):
        if not name.startswith(inside) and callable(getattr(module, "get_output_embeddings", None)):
            found.append((name, module))
            inside += (f"{name}." if name else "",)
    return found[0] if len(found) == 1 else ("", model)


def join(prefix: str, local: str) -> str:
    """The name of something below a module.

    >>> join("model.layers.0", "weight"), join("", "weight")
    ('model.layers.0.weight', 'weight')
    """
    return f"{prefix}.{local}" if prefix else local


def is_below(name: str, prefix: str) -> bool:
    """Whether a name is that of a module, or of something below it; of the root everything is.

    >>> is_below("model.norm", "model"), is_below("models", "model"), is_below("model", "")
    (True, False, True)
    """
    return prefix == "" or name == prefix or name.startswith(f"{prefix}.")
