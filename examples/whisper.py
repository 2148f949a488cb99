"""Whisper, with an adapter for sounds it has not met: melodies of pure tones are known, those of an organ are learnt.

The base, a small Whisper, learns in full to write down the notes of pure tones. The adapter then learns the same for an
instrument with strong overtones, out of tune and with noise. Everything is made by code, nothing is downloaded.

    python examples/whisper.py

For a real model take ``WhisperForConditionalGeneration.from_pretrained("openai/whisper-small")`` in place of
``small_whisper()``, and recordings with transcripts in place of the melodies.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics.text import WordErrorRate
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from lora_lightning import LoraCallback, LoraConfig

NOTES = {"c": 262, "d": 294, "e": 330, "g": 392, "a": 440}  # Hz
PAD, START, END = 0, 1, 2
WORDS = ["<pad>", "<start>", "<end>", *NOTES]
SECONDS, LENGTH = 1, 4  # of a melody: how long, how many notes
EXTRACT = WhisperFeatureExtractor(feature_size=32, chunk_length=SECONDS)


class Melodies(Dataset):
    """Random melodies: features (32, frames) and the notes' numbers (LENGTH + 1,), the end among them.

    Args:
        rows: How many.
        organ: Played by the organ, not as pure tones.
        seed: Which.
    """

    def __init__(self, rows: int, *, organ: bool, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.rows = [self._row(random, organ) for _ in range(rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.rows[index]

    @staticmethod
    def _row(random: np.random.Generator, organ: bool) -> tuple[Tensor, Tensor]:
        names = random.choice(list(NOTES), LENGTH)
        rate = EXTRACT.sampling_rate
        time = np.arange(rate * SECONDS // LENGTH) / rate
        tune = 2 ** (random.normal(0, 0.25) / 12) if organ else 1  # a quarter of a semitone, for the whole melody
        overtones = {1: 0.4, 2: 1.0, 3: 0.8, 4: 0.6} if organ else {1: 1.0}
        sound = np.concatenate(
            [
                sum(loud * np.sin(2 * math.pi * NOTES[name] * tune * order * time) for order, loud in overtones.items())
                for name in names
            ]
        )
        sound = sound + random.normal(0, 0.3 if organ else 0.01, sound.shape)
        features = EXTRACT(sound, sampling_rate=rate, return_tensors="pt").input_features[0]
        return features, torch.tensor([*(WORDS.index(name) for name in names), END])


class Transcriber(pl.LightningModule):
    """Any speech model of transformers that takes ``input_features`` and ``labels``."""

    def __init__(self, model: WhisperForConditionalGeneration, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.errors = WordErrorRate()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """``batch``: features (B, 32, frames) and labels (B, LENGTH + 1)."""
        features, labels = batch
        return self.model(input_features=features, labels=labels).loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The share of notes that were heard wrong."""
        features, labels = batch
        heard = self.model.generate(features, max_new_tokens=LENGTH + 1, do_sample=False)
        self.errors(written(heard), written(labels))
        self.log("val_note_errors", self.errors)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Under the callback only the adapter is left in it."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def written(ids_BT: Tensor) -> list[str]:
    """Notes by name, up to the end: ``"c e g c"``."""
    texts = []
    for ids in ids_BT.tolist():
        ids = ids[: ids.index(END)] if END in ids else ids
        texts.append(" ".join(WORDS[number] for number in ids if number > END))
    return texts


def small_whisper() -> WhisperForConditionalGeneration:
    """The architecture of Whisper with two layers on each side."""
    config = WhisperConfig(
        vocab_size=len(WORDS), num_mel_bins=EXTRACT.feature_size, d_model=64, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128,
        max_source_positions=SECONDS * 50, max_target_positions=16, pad_token_id=PAD, bos_token_id=START,
        eos_token_id=END, decoder_start_token_id=START, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.update(max_length=16, suppress_tokens=None, begin_suppress_tokens=None)
    return model


def main() -> None:
    """Make a base, then adapt it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="of each of both trainings (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=2000, help="melodies to learn from (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/whisper"), help="default: %(default)s")
    chosen = parser.parse_args()

    pl.seed_everything(0)
    model = small_whisper()
    length = {"max_steps": chosen.steps, "logger": False, "enable_checkpointing": False, "default_root_dir": chosen.out}
    tones = DataLoader(Melodies(chosen.rows, organ=False, seed=1), batch_size=32, shuffle=True)
    pl.Trainer(**length).fit(Transcriber(model, 2e-3), tones)

    organ = DataLoader(Melodies(chosen.rows, organ=True, seed=2), batch_size=32, shuffle=True)
    held = DataLoader(Melodies(128, organ=True, seed=3), batch_size=64)
    lora = LoraCallback(LoraConfig(r=8, lora_alpha=16))
    transcriber = Transcriber(model, 2e-3)
    trainer = pl.Trainer(callbacks=[lora], **length)
    before = trainer.validate(transcriber, held, verbose=False)[0]["val_note_errors"]
    trainer.fit(transcriber, organ)
    after = trainer.validate(transcriber, held, verbose=False)[0]["val_note_errors"]
    print(f"notes of the organ heard wrong: {before:.1%} before, {after:.1%} after; the adapter: {lora.adapter_path}")


if __name__ == "__main__":
    main()
