"""Classes that a module is given in place of its own: subclasses of what it was, made once each, which pickle."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

_MADE: dict[tuple[type, type[nn.Module]], type[nn.Module]] = {}
_PLAIN_OF: dict[type, type[nn.Module]] = {}


def made_class(over: type, plain: type[nn.Module]) -> type[nn.Module]:
    """The class that is ``over`` first and ``plain`` after it, made at its first use.

    Args:
        over: A class at module level, whose forward goes before the plain one's.
        plain: The class that a module has.
    """
    key = (over, plain)
    if key not in _MADE:
        name = f"Lora{plain.__name__}"
        read = staticmethod(plain.forward)  # what the class says now; someone may give it another forward later
        members = {"__module__": __name__, "__qualname__": name, "__reduce_ex__": _reduce, "lora_read": read}
        _MADE[key] = declare(type(name, (over, plain), members), plain)
        _OVER[_MADE[key]] = over
    return _MADE[key]


def declare(changed: type[nn.Module], plain: type[nn.Module]) -> type[nn.Module]:
    """Note that ``changed`` stands for ``plain``, so that :func:`plain_class` knows the way back."""
    _PLAIN_OF[changed] = plain
    return changed


def plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a module had before it got one of ours; None if its class is not (or no longer) one of ours."""
    return _PLAIN_OF.get(type(module))


def replaced(method: Any, read: Any) -> bool:
    """Whether a class has been given another forward than the one it had when it was read."""
    return getattr(method, "__func__", None) is not read


_OVER: dict[type, type] = {}


def _reduce(module: nn.Module, protocol: int) -> tuple:
    reduced = cast("tuple", object.__reduce_ex__(module, protocol))
    return (_rebuild, (_OVER[type(module)], _PLAIN_OF[type(module)]), *reduced[2:])


def _rebuild(over: type, plain: type[nn.Module]) -> nn.Module:
    made: Any = made_class(over, plain)
    return made.__new__(made)
