"""DDP: every process holds everything."""

from __future__ import annotations

from torch import nn

from lora_lightning.strategies.broadcast import skip_frozen
from lora_lightning.strategies.state import AdapterState


class DdpState(AdapterState):
    """Spares DDP the broadcast of a base that every process has loaded."""

    def injected(self, target: nn.Module, *, by_callback: bool) -> None:
        """Name to DDP what need not be sent."""
        skip_frozen(self.module)
