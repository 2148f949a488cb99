"""Real scans of handwritten digits, from scikit-learn."""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset


class Digits(pl.LightningDataModule):
    """Pixels (64,) in [0, 1] and labels 0 to 9.

    Args:
        batch_size: Of training.
        held: Scans for validation, and as many for the test.
    """

    def __init__(self, batch_size: int = 64, held: int = 200) -> None:
        super().__init__()
        self.batch_size = batch_size
        scans = load_digits()
        pixels, labels = torch.tensor(scans.data, dtype=torch.float32) / 16, torch.tensor(scans.target)
        self.test, self.val, self.train = (
            TensorDataset(pixels[part], labels[part])
            for part in (slice(held), slice(held, 2 * held), slice(2 * held, None))
        )

    def train_dataloader(self) -> DataLoader:
        """Shuffled."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """All at once."""
        return DataLoader(self.val, batch_size=len(self.val))

    def test_dataloader(self) -> DataLoader:
        """All at once."""
        return DataLoader(self.test, batch_size=len(self.test))
