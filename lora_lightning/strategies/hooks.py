"""Hooks of a LightningModule that injection has to come after, or optimizers go through.

They are replaced on the instance by partials of module-level functions, which call a callback's methods: those pickle
and deep-copy with the module (callbacks that average weights copy it), and Lightning sees through them whether a hook
is overridden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from lora_lightning.strategies.replaced import own_linear

HOOKS = ("setup", "configure_model", "configure_optimizers")
Inject = Callable[[pl.Trainer, pl.LightningModule], None]


def wrap(pl_module: pl.LightningModule, hook: str, around: Callable[..., Any], *args: Any) -> None:
    """Have a hook run as ``around(*args, pl_module, call)``, where ``call()`` runs the hook itself."""
    previous = vars(pl_module).get(hook)
    vars(pl_module)[hook] = functools.partial(_run, around, args, hook, pl_module, previous)


def inject_when_built(trainer: pl.Trainer, pl_module: pl.LightningModule, inject: Inject) -> None:
    """Inject as soon as the network is there: all or part of it may be built in ``setup``, then ``configure_model``.

    Args:
        trainer: Whose setup it is.
        pl_module: The module; where it has neither hook, its network is there now.
        inject: What to call with the trainer and the module, after the last of the two hooks that it has.
    """
    builds = is_overridden("configure_model", pl_module)
    if builds:
        wrap(pl_module, "configure_model", _configure_model, inject)
    if is_overridden("setup", pl_module):
        wrap(pl_module, "setup", _setup, None if builds else inject)
    elif not builds:
        inject(trainer, pl_module)


def _setup(inject: Inject | None, pl_module: pl.LightningModule, call: Callable[[], None]) -> None:
    call()
    unwrap(pl_module, "setup")
    if inject is not None:
        inject(pl_module.trainer, pl_module)


def _configure_model(inject: Inject, pl_module: pl.LightningModule, call: Callable[[], None]) -> None:
    call()
    with own_linear():
        inject(pl_module.trainer, pl_module)
    # Taken off at once: a strategy that demands an overridden configure_model is to see the module's own.
    unwrap(pl_module, "configure_model")


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
