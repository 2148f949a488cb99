"""Hooks of a LightningModule that injection has to come after, or optimizers go through.

They are replaced on the instance by partials of module-level functions: those pickle and deep-copy with the module
(callbacks that average weights copy it), and Lightning sees through them whether a hook is overridden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

HOOKS = ("setup", "configure_model", "configure_optimizers")


def wrap(pl_module: pl.LightningModule, hook: str, around: Callable[..., Any], *args: Any) -> None:
    """Have a hook run as ``around(*args, pl_module, call)``, where ``call()`` runs the hook itself."""
    previous = vars(pl_module).get(hook)
    vars(pl_module)[hook] = functools.partial(_run, around, args, hook, pl_module, previous)


def unwrap(pl_module: pl.LightningModule, *hooks: str) -> None:
    """Take off whatever :func:`wrap` has put around these hooks, or around all of them."""
    for hook in hooks or HOOKS:
        while isinstance(wrapper := vars(pl_module).get(hook), functools.partial) and wrapper.func is _run:
            previous = wrapper.args[-1]
            if previous is None:
                del vars(pl_module)[hook]
            else:
                vars(pl_module)[hook] = previous


def _run(
    around: Callable[..., Any],
    args: tuple,
    hook: str,
    pl_module: pl.LightningModule,
    previous: Any,
    *given: Any,
    **named: Any,
) -> Any:
    # The class's own hook is looked up anew: a bound method kept here would tie a deep copy to the original.
    call = previous if previous is not None else functools.partial(getattr(type(pl_module), hook), pl_module)
    return around(*args, pl_module, functools.partial(call, *given, **named))
