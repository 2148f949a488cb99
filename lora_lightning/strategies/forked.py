"""``ddp_fork``, ``ddp_spawn``, ``ddp_notebook``: training in processes whose models do not come back."""

from __future__ import annotations

import functools

from torch import nn

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.state import lora_state_dict
from lora_lightning.strategies.ddp import DdpState


class ForkedState(DdpState):
    """Sends the adapter, and nothing of the base, back to the process that called ``fit``.

    Lightning loads there what the trained module's ``state_dict`` gives, and passes over names that it does not find:
    the model has to have its adapters before the processes start.
    """

    def injected(self, target: nn.Module, *, by_callback: bool) -> None:
        """See that the calling process has the adapters too.

        Raises:
            LoraConfigError: If it has not.
        """
        if by_callback:
            raise LoraConfigError(
                f"{type(self.strategy).__name__} trains in processes of its own, and the adapter would be lost with "
                "them: call inject_lora(model, config) on the LightningModule before trainer.fit (LoraCallback() then "
                "finds it there), or use strategy='ddp'"
            )
        super().injected(target, by_callback=by_callback)
        vars(self.module)["state_dict"] = functools.partial(_adapter_only, self.module)


def _adapter_only(module: nn.Module, *args: object, **kwargs: object) -> dict[str, object]:
    return dict(lora_state_dict(module))
