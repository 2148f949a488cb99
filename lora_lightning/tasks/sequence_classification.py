"""Training a model to sort texts into classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lora_lightning.errors import LoraConfigError
from lora_lightning.tasks.base import Task
from lora_lightning.tasks.loss import LossSum, classification_loss
from lora_lightning.tasks.model import load_model, load_tokenizer
from lora_lightning.tasks.model_config import ModelConfig


class SequenceClassification(Task):
    """A model with a classification head, each text belonging to one class.

    A batch is a mapping of ``input_ids`` and ``attention_mask`` (B, T), ``labels`` (B,), and what else the model
    takes. Logs ``train_loss``, ``tokens_per_second``, and for validation and test the loss, the accuracy and ``f1``
    (the mean over classes).

    Args:
        model: The base model: its name, or the fields of a `ModelConfig`.
        num_labels: How many classes there are, at least 2.
        label_names: What they are called, in the order of their numbers; None is ``LABEL_0``, ``LABEL_1`` …
        optimizer: Called with the list of trainable parameters, or with this module if it has a parameter called
            ``model``; None is AdamW.
        scheduler: Called with the optimizer and, if it has such a parameter, ``num_training_steps``; None is a
            constant learning rate.
        learning_rate: For the default optimizer.
        weight_decay: For the default optimizer.

    Raises:
        LoraConfigError: The model cannot be had, its config is wrong, or the classes are.
    """

    lora_task_type = "SEQ_CLS"

    def __init__(
        self,
        model: str | dict[str, Any] | ModelConfig = "demo:minilm-l6",
        *,
        num_labels: int,
        label_names: list[str] | None = None,
        optimizer: Callable[..., Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        label_names = _checked_names(num_labels, label_names)
        super().__init__(
            optimizer=optimizer,
            scheduler=scheduler,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            metrics={
                "accuracy": MulticlassAccuracy(num_labels, average="micro"),
                "f1": MulticlassF1Score(num_labels, average="macro"),
            },
        )
        config = ModelConfig.of(model)
        self.label_names = label_names
        self.save_hyperparameters(
            {
                "model": asdict(config),
                "num_labels": num_labels,
                "label_names": label_names,
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
            }
        )
        self.base = config
        self.tokenizer = load_tokenizer(config)
        self.model = load_model(
            config,
            "sequence_classification",
            num_labels=num_labels,
            id2label=dict(enumerate(label_names)),
            label2id={name: number for number, name in enumerate(label_names)},
        )
        if self.model.config.pad_token_id is None:
            # A decoder with a classification head reads the last token that is no padding, and has to know which is.
            self.model.config.pad_token_id = self.tokenizer.pad_token_id

    def loss_sum(self, batch: Mapping[str, Tensor]) -> LossSum:
        """Sum the losses of the rows."""
        return classification_loss(self.model, batch)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int = 0) -> list[dict[str, Any]]:
        """Name the likeliest class of each row.

        Returns:
            For each row its ``label`` and the ``probabilities`` of all classes by name.
        """
        with torch.no_grad():
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            rows = self.model(**inputs).logits.float().softmax(dim=-1).tolist()
        named = [dict(zip(self.label_names, row, strict=True)) for row in rows]
        return [{"label": max(row, key=row.__getitem__), "probabilities": row} for row in named]


def _checked_names(num_labels: int, label_names: list[str] | None) -> list[str]:
    if isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 2:
        raise LoraConfigError(f"num_labels must be a whole number of at least 2, got {num_labels!r}")
    names = [f"LABEL_{number}" for number in range(num_labels)] if label_names is None else list(label_names)
    if len(names) != num_labels or len(set(names)) != num_labels:
        raise LoraConfigError(f"label_names must be {num_labels} different names, got {len(names)}: {names!r}")
    return names
