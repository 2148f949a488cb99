"""A vision transformer that knows some classes learns others with LoRA: real scans of handwritten digits.

The base learns 0 to 4 in full; the adapter, and a head of its own that is saved with it, learn 5 to 9.

    python examples/vit.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from transformers import ViTConfig, ViTForImageClassification

from lora_lightning import LoraCallback, LoraConfig


class Classifier(pl.LightningModule):
    """Any image classifier of transformers; ``from_pretrained("google/vit-base-patch16-224")`` fits as well."""

    def __init__(self, model: ViTForImageClassification, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.accuracy = MulticlassAccuracy(model.config.num_labels, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """``batch``: pixels (B, 1, 8, 8) and labels (B,)."""
        pixels, labels = batch
        return self.model(pixel_values=pixels, labels=labels).loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The share of images told right."""
        pixels, labels = batch
        self.accuracy(self.model(pixel_values=pixels).logits, labels)
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Under the callback only the adapter and the new head are left in it."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def digits(first: int) -> tuple[DataLoader, DataLoader]:
    """Scans of five digits beginning with ``first``, labelled 0 to 4: for training and for validation."""
    scans = load_digits()
    labels = torch.tensor(scans.target) - first
    chosen = (labels >= 0) & (labels < 5)
    pixels = torch.tensor(scans.images, dtype=torch.float32)[chosen].unsqueeze(1) / 8 - 1
    labels = labels[chosen]
    train, held = TensorDataset(pixels[200:], labels[200:]), TensorDataset(pixels[:200], labels[:200])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(held, batch_size=200)


def main() -> None:
    """Make a base, then adapt it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=8, help="of each of both trainings (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/vit"), help="default: %(default)s")
    chosen = parser.parse_args()

    pl.seed_everything(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, num_labels=5, hidden_size=64, intermediate_size=128,
        num_hidden_layers=3, num_attention_heads=4,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    base, held = digits(0)
    pl.Trainer(max_epochs=chosen.epochs, logger=False, enable_checkpointing=False, default_root_dir=chosen.out).fit(
        Classifier(model, 3e-3), base, held
    )

    lora = LoraCallback(LoraConfig(r=8, lora_alpha=16, modules_to_save=["classifier"]))
    classifier = Classifier(model, 5e-3)
    trainer = pl.Trainer(
        max_epochs=chosen.epochs,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=chosen.out,
        callbacks=[lora],
    )
    train, held = digits(5)
    trainer.fit(classifier, train, held)
    print(lora.report)
    print(f"digits 5 to 9: {trainer.callback_metrics['val_accuracy']:.1%} right; the adapter: {lora.adapter_path}")


if __name__ == "__main__":
    main()
