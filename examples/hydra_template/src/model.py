"""A LightningModule as the template has them: it knows nothing of LoRA."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy


def dense(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths, with ReLU between them."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class DigitsModule(pl.LightningModule):
    """Tells digits apart.

    Args:
        net: From pixels (B, 64) to logits (B, 10).
        optimizer: Makes one of the parameters.
    """

    def __init__(self, net: nn.Module, optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        pixels, labels = batch
        return functional.cross_entropy(self.net(pixels), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The share that was told right."""
        pixels, labels = batch
        self.accuracy(self.net(pixels), labels)
        self.log("val/acc", self.accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The same, of the test's scans."""
        pixels, labels = batch
        self.accuracy(self.net(pixels), labels)
        self.log("test/acc", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Over all parameters: the callback leaves in it what trains."""
        return self.optimizer(self.parameters())
