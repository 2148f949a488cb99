"""The task of a job that is trained together with others: its batches are scored elsewhere, all else is its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from lora_lightning.reports.recorder import RunRecorder
from lora_lightning.sweeps.packed.baton import Player
from lora_lightning.sweeps.packed.ending import end_if_asked
from lora_lightning.sweeps.packed.requests import Score
from lora_lightning.tasks import CausalLM
from lora_lightning.tasks.loss import LossSum
from lora_lightning.tasks.model_config import ModelConfig
from lora_lightning.tasks.packing import is_packed


class PackedCausalLM(CausalLM):
    """A `CausalLM` over a given network, which hands its batches in to be scored with those of other jobs.

    Args:
        *args: Those of `CausalLM`.
        network: The job's own shell of the base that all share.
        tokenizer: Its tokenizer.
        player: Through which batches are handed in.
        callbacks: More callbacks for its Trainer.
        **settings: Those of `CausalLM`.
    """

    def __init__(
        self,
        *args: Any,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        player: Player,
        callbacks: Sequence[Callback] = (),
        **settings: Any,
    ) -> None:
        self._given, self._player, self._more = (tokenizer, network), player, list(callbacks)
        super().__init__(*args, **settings)
        del self._given

    def _load(self, config: ModelConfig) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        return self._given

    def cpu(self) -> Self:
        """Stay: a strategy that ends moves its module, which would copy the base, and copy it back for a validation."""
        return self

    def configure_callbacks(self) -> list[Callback]:
        """Add what the jobs of the process have beside their own callbacks."""
        return [*super().configure_callbacks(), *self._more]

    def loss_sum(self, batch: Mapping[str, Tensor]) -> LossSum:
        """Sum the losses of the labelled tokens, in training with a graph whose leaves are the adapter's parameters."""
        train = torch.is_grad_enabled()
        if train:
            self._let_go()
        answer = None if is_packed(batch) else self._player.hand_in(Score(self.model, batch, train))
        end_if_asked(self._player, self.trainer)
        self._tell_of_others()
        torch.set_num_threads(self._player.context.threads if answer is None else 1)  # until the next batch
        if answer is None:
            return super().loss_sum(batch)
        total, terms, gradients = answer
        if train:
            parameters = [parameter for parameter, _ in gradients]
            total = _HandedOut.apply(total, [gradient for _, gradient in gradients], *parameters)
        return LossSum(total, terms)

    def _let_go(self) -> None:
        """Gradients of the step before, which Lightning would drop after this forward, are not to outlast it."""
        if self.trainer.fit_loop.batch_idx % self.trainer.accumulate_grad_batches == 0:
            for parameter in self.model.parameters():
                parameter.grad = None

    def _tell_of_others(self) -> None:
        """Seconds and memory of a run are those of the process, so its result says how many others there were."""
        for each in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(each, RunRecorder):
                each.fields["shared_with"] = self._player.beside


class _HandedOut(torch.autograd.Function):
    """A loss whose gradients are known already: in backward they are handed to the parameters."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_(gradients, gradient)  # nobody else has them
        return None, None, *gradients
