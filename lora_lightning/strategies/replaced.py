"""Layers that Lightning puts in the place of others once a network is injected, and the adapters in those."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator

import lightning.pytorch as pl
from lightning.pytorch.plugins import DeepSpeedPrecision, DoublePrecision, FSDPPrecision, HalfPrecision, Precision
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.nn.modules import linear

from lora_lightning.errors import LoraConfigError
from lora_lightning.layers.bits import bits_of, is_quantised

_CASTING = (HalfPrecision, DoublePrecision, FSDPPrecision, DeepSpeedPrecision)
_MARK = "_lora_"  # what injection leaves in a module's dictionary begins so


def convert_first(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let a precision plugin that replaces layers (``BitsandbytesPrecision``) do so before they get adapters.

    The strategy asks it once more afterwards, and it leaves alone what is converted.
    """
    plugin = trainer.precision_plugin
    if type(plugin).convert_module is not Precision.convert_module and not isinstance(plugin, _CASTING):
        plugin.convert_module(pl_module)
        for layer in pl_module.modules():
            # bitsandbytes quantises on the way to the device. What is noted of the base is to be of what is trained on.
            if is_quantised(layer) and bits_of(layer) is None:
                layer.to(trainer.strategy.root_device)


@contextlib.contextmanager
def own_linear() -> Iterator[None]:
    """``torch.nn.Linear`` is torch's own inside the ``with`` block.

    While a LightningModule's ``configure_model`` runs, a plugin that quantises puts a class of its own under that name.
    """
    shown = nn.Linear
    nn.Linear = linear.Linear  # type: ignore[misc]
    try:
        yield
    finally:
        nn.Linear = shown  # type: ignore[misc]


def keep_marks(strategy: Strategy) -> None:
    """Let what ``sync_batchnorm=True`` puts in the place of norms, and back, know what injection has left in them."""
    sync = getattr(strategy, "_layer_sync", None)
    for method in ("apply", "revert") if sync is not None else ():
        if method not in vars(sync):
            vars(sync)[method] = functools.partial(_carry, getattr(sync, method))


def _carry(convert: Callable[[nn.Module], nn.Module], model: nn.Module) -> nn.Module:
    before = dict(model.named_modules())
    converted = convert(model)
    for name, module in converted.named_modules():
        if (old := before.get(name)) is not None and old is not module:
            module.training = old.training
            vars(module).update({key: value for key, value in vars(old).items() if key.startswith(_MARK)})
    return converted


def check_there(wanted: Collection[str], found: Collection[str], trainer: pl.Trainer) -> None:
    """See that a network still has the adapters that it was given.

    Raises:
        LoraConfigError: If something has replaced their layers since.
    """
    if lost := [name for name in wanted if name not in found]:
        raise LoraConfigError(
            f"{len(lost)} adapter tensors are gone since injection, first {lost[0]}: something has put other layers in "
            f"the place of those with adapters (the precision plugin is {type(trainer.precision_plugin).__name__}). "
            "Let it do so before inject_lora is called, or leave injection to the callback"
        )
