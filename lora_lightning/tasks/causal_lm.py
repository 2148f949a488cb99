"""Training a causal language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_lightning.tasks.base import Task
from lora_lightning.tasks.generate import generate_text
from lora_lightning.tasks.loss import IGNORED, LossSum, causal_lm_loss, token_losses
from lora_lightning.tasks.model import load_model, load_tokenizer
from lora_lightning.tasks.model_config import ModelConfig
from lora_lightning.tasks.packing import Route, find_route, is_packed


class CausalLM(Task):
    """A causal language model that learns to write what the labels of its batches say.

    A batch is a mapping of ``input_ids``, ``attention_mask`` and ``labels``, each (B, T), right-padded;
    ``labels[b, t]`` is the label of token t itself, -100 where it is not trained. Of packed rows, ``position_ids``
    (B, T), 0 where an example begins, takes the place of the mask, and examples do not see each other. Logs
    ``train_loss`` (the mean over an optimizer step), ``tokens_per_second``, ``val_loss`` and ``test_loss`` (means over
    all labels) and the perplexities, which are their exponentials.

    Args:
        model: The base model: its name, or the fields of a `ModelConfig`.
        optimizer: Called with the list of trainable parameters, or with this module if it has a parameter called
            ``model``; None is AdamW.
        scheduler: Called with the optimizer and, if it has such a parameter, ``num_training_steps``; None is a
            constant learning rate.
        learning_rate: For the default optimizer.
        weight_decay: For the default optimizer.
        max_new_tokens: Length of generated texts, at most.

    Raises:
        LoraConfigError: The model cannot be had, or its config is wrong.
    """

    lora_task_type = "CAUSAL_LM"

    def __init__(
        self,
        model: str | dict[str, Any] | ModelConfig = "demo:tiny-llama",
        *,
        optimizer: Callable[..., Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        max_new_tokens: int = 32,
    ) -> None:
        super().__init__(
            optimizer=optimizer, scheduler=scheduler, learning_rate=learning_rate, weight_decay=weight_decay
        )
        config = ModelConfig.of(model)
        self.save_hyperparameters(
            {
                "model": asdict(config),
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "max_new_tokens": max_new_tokens,
            }
        )
        self.max_new_tokens = max_new_tokens
        self.base = config
        self.tokenizer, self.model = self._load(config)
        self._route: Route | None = None

    def _load(self, config: ModelConfig) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        """The tokenizer and the network, which a subclass may have at hand."""
        return load_tokenizer(config), load_model(config, "causal_lm")

    def on_train_start(self) -> None:
        """Find out anew how packed rows are to be run: model and strategy may not be those of the last fit."""
        super().on_train_start()
        self._leave_route()
        self._route = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Put the model's own attention back, once nothing of the batch is computed any more."""
        self._leave_route()

    def loss_sum(self, batch: Mapping[str, Tensor]) -> LossSum:
        """Sum the losses of the labelled tokens."""
        with self._as_the_model_takes_it(batch) as ready:
            return causal_lm_loss(self.model, ready)

    @contextmanager
    def _as_the_model_takes_it(self, batch: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
        """Packed rows with the model's attention switched, until the backward pass (it may compute again) is over."""
        if not is_packed(batch):
            yield batch
            return
        if self._route is None:  # here, where every strategy has everything ready for a forward
            agreed = self.trainer.strategy.reduce_boolean_decision if self._trainer else bool
            self._route = find_route(
                self.model, lambda few: token_losses(self.model, few).losses_K, agreed, batch["input_ids"].device
            )
            rank_zero_info(f"Packed rows: {self._route.told}.")
        self._route.enter()
        try:
            yield self._route.prepare(batch)
        except BaseException:
            self._leave_route()
            raise
        if not torch.is_grad_enabled():
            self._leave_route()

    def _leave_route(self) -> None:
        if self._route is not None:
            self._route.leave()

    def derived(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The perplexity: the exponential of the mean loss of a token."""
        return {"perplexity": values["loss"].exp()}

    def generate_text(self, prompts: list[str], max_new_tokens: int | None = None) -> list[str]:
        """Continue prompts greedily; training is not disturbed.

        Args:
            prompts: Texts as a chat template renders them, generation prompt included.
            max_new_tokens: At most so many tokens each; None is the module's own setting.

        Returns:
            What follows each prompt, up to the end of the turn, without special tokens.
        """
        self._leave_route()
        return generate_text(self.model, self.tokenizer, prompts, max_new_tokens or self.max_new_tokens)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> list[str] | Tensor:
        """Continue prompts, or score rows.

        Args:
            batch: A list of prompts, or a batch as in training.
            batch_idx: Which batch it is.

        Returns:
            For prompts, the generated texts. For a batch, the mean loss of each row's labels, (B,); NaN for a row
            without any.
        """
        if isinstance(batch, (list, tuple)):
            return self.generate_text(list(batch))
        with torch.no_grad(), self._as_the_model_takes_it(batch) as ready:
            losses_K = token_losses(self.model, ready).losses_K
        rows_K = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0].to(losses_K.device)
        sums = losses_K.new_zeros(2, len(batch["labels"]))
        losses_B, counts_B = sums.index_add_(1, rows_K, torch.stack([losses_K, torch.ones_like(losses_K)]))
        return losses_B / counts_B
