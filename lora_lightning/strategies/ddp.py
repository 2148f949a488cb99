"""DDP: every process holds everything."""

from __future__ import annotations

from typing import cast

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.optim import Optimizer

from lora_lightning.strategies.broadcast import skip_frozen
from lora_lightning.strategies.replicated import average_gradients
from lora_lightning.strategies.state import AdapterState


class DdpState(AdapterState):
    """Spares DDP the broadcast of a base that every process has loaded."""

    def injected(self, target: nn.Module, *, by_callback: bool) -> None:
        """Name to DDP what need not be sent."""
        skip_frozen(self.module)

    def narrowed(self) -> None:
        """Wrap anew: DDP would wait for gradients of all that trained when it was wrapped."""
        self.strategy.model = self.module
        cast("DDPStrategy", self.strategy).configure_ddp()

    def begin_fit(self) -> None:
        """Note which parameters DDP averages: those that train now."""
        super().begin_fit()
        self._averaged = {id(p) for p in self.module.parameters() if p.requires_grad}

    def synchronise(self, optimizer: Optimizer) -> None:
        """Average what DDP does not: gradients of parameters that a callback has let train since."""
        held = [p for group in optimizer.param_groups for p in group["params"]]
        late = [p for p in held if id(p) not in self._averaged]
        if late and (world := dist.group.WORLD) is not None:
            average_gradients(late, world)
