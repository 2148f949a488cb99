"""What all tasks share: an optimizer over what trains, a loss whose mean is exact, and what is shown of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric, Metric, MetricCollection
from transformers import PreTrainedModel

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.inject import default_seed
from lora_lightning.strategies import window
from lora_lightning.strategies.blocks import blocks
from lora_lightning.strategies.parallelize import shard
from lora_lightning.tasks.compiling import WarmUp
from lora_lightning.tasks.loss import LossSum
from lora_lightning.tasks.model import fill_model
from lora_lightning.tasks.model_config import ModelConfig
from lora_lightning.tasks.throughput import Throughput

Stage = Literal["val", "test"]

# Gradients are those of the summed loss over this number until the true count is known. Any power of two would do:
# it only moves exponents, so that it costs no precision; this one keeps half-precision gradients near their usual size.
_REFERENCE = 1024.0


class Task(LightningModule):
    """A LightningModule whose training loss is the mean over all that was scored between two optimizer steps.

    Lightning averages the mean losses of accumulated batches and of devices, which weighs a token of a short batch
    more than one of a long batch. Here, the gradients of sums are accumulated and divided once, before clipping, by
    the count over the whole window and all devices: 4 batches of 2 rows train as 1 batch of 8 does.

    A subclass says how a batch is scored (`loss_sum`), and may add to what is logged (`derived`).

    Args:
        optimizer: Called with the list of trainable parameters, or with this module if it has a parameter called
            ``model`` (those of `lora_lightning.optim` that know ``A`` from ``B`` have); None is AdamW.
        scheduler: Called with the optimizer and, if it has such a parameter, ``num_training_steps``; None is a
            constant learning rate.
        learning_rate: For the default optimizer.
        weight_decay: For the default optimizer.
        metrics: Metrics of logits and labels for validation and test, by the name they are logged under.
    """

    lora_task_type: str
    model: PreTrainedModel
    base: ModelConfig | None = None
    """Which model it is, and how it is loaded."""

    def __init__(
        self,
        *,
        optimizer: Callable[..., Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self._optimizer_factory = optimizer
        self._scheduler_factory = scheduler
        self._means = nn.ModuleDict({stage: MeanMetric() for stage in ("val", "test")})
        self._metrics = nn.ModuleDict({stage: MetricCollection(dict(metrics or {})).clone() for stage in self._means})
        self._window: Tensor | None = None
        self._tokens_seen: Tensor | None = None
        self._throughput = Throughput()

    # What a subclass says

    def loss_sum(self, batch: Mapping[str, Tensor]) -> LossSum:
        """Score a batch: the sum of its losses, how many they are, and the logits if there are metrics of them."""
        raise NotImplementedError

    def derived(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """More values to log, computed from those of a whole validation or test (``loss`` and the metrics)."""
        return {}

    # Sharding

    def configure_model(self) -> None:
        """Spread the network over the processes where the strategy leaves that to it, and read weights not read yet.

        Such are FSDP2 and tensor parallel (``ModelParallelStrategy``), which bring a device mesh. Weights are read here
        where the model's config says ``in_parts``. Otherwise, and at later stages, nothing is done.
        """
        if self.device_mesh is not None and not any(isinstance(p, DTensor) for p in self.model.parameters()):
            shard(self.model, self.device_mesh, precision=self.trainer.precision)
        if self.base is not None and any(p.is_meta for p in self.model.parameters()):
            seed = default_seed()
            fill_model(self.model, self.base, self.trainer.strategy.broadcast(seed) if self._trainer else seed)

    # Training

    def configure_callbacks(self) -> list[Callback]:
        """Tell what warming up costs where the model is compiled."""
        return [WarmUp(len(blocks(self.model)) or 1)] if self.base is not None and self.base.compile else []

    @property
    def tokens_seen(self) -> int:
        """Tokens that this process trained on since the start of training, padding not counted."""
        return 0 if self._tokens_seen is None else int(self._tokens_seen)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second that all processes together train on; None before the second step's end."""
        rate = self._throughput.rate
        return None if rate is None else float(rate)

    def on_train_start(self) -> None:
        """Begin with empty counts, whatever an earlier, interrupted fit left."""
        self._window = self._tokens_seen = None
        self._throughput = Throughput()

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return a loss with the gradient of the sum and, for whoever looks at it, the value of the batch's mean."""
        total, count = self.loss_sum(batch)[:2]
        tokens = _count_tokens(batch)
        self._tokens_seen = tokens if self._tokens_seen is None else self._tokens_seen + tokens
        counted = torch.stack([total.detach(), count.to(total.dtype), tokens.to(total.dtype)])
        self._window = counted if self._window is None else self._window + counted
        # Lightning divides by the accumulated batches, a distributed strategy averages over the processes.
        summed = total * (self.trainer.accumulate_grad_batches * self.trainer.world_size / _REFERENCE)
        return summed + (total / count.clamp(min=1) - summed).detach()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the count of the window; clipping comes after this."""
        if self._window is None or not window.is_full(self.trainer.strategy):
            return
        total, count, tokens = self.trainer.strategy.reduce(self._window, reduce_op="sum")
        self._window = None
        count = count.clamp(min=1)  # a window in which every label is masked: its gradients are zero, and stay so
        window.scale_gradients(self.trainer.strategy, optimizer, _REFERENCE / count)
        # Processes that hold parts of one layer have all seen the same rows, which are to be counted once.
        shares = (self.trainer.distributed_sampler_kwargs or {}).get("num_replicas", self.trainer.world_size)
        self._throughput.add(tokens * (shares / self.trainer.world_size))
        self.log("train_loss", total / count, prog_bar=True)
        if (rate := self._throughput.rate) is not None:
            self.log("tokens_per_second", rate, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Make the optimizer over all parameters that train, and the scheduler.

        Raises:
            LoraConfigError: Nothing trains, or the scheduler needs a number of steps that nobody knows.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not trained:
            raise LoraConfigError("No parameter of the model requires a gradient: there is nothing to train.")
        if self._optimizer_factory is None:
            optimizer: Optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay)
        else:
            wants_model = "model" in inspect.signature(self._optimizer_factory).parameters
            optimizer = self._optimizer_factory(self if wants_model else trained)
        if self._scheduler_factory is None:
            return optimizer
        scheduler = self._make_scheduler(self._scheduler_factory, optimizer)
        when: dict[str, Any] = {"interval": "step"}
        if isinstance(scheduler, ReduceLROnPlateau):
            when = {"interval": "epoch", "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **when}}

    def _make_scheduler(self, factory: Callable[..., Any], optimizer: Optimizer) -> Any:
        bound = getattr(factory, "keywords", {})
        if "num_training_steps" in bound or "num_training_steps" not in inspect.signature(factory).parameters:
            return factory(optimizer)
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps) or steps < 1:
            raise LoraConfigError(
                "The scheduler needs to know how many steps the run has, but its data has no length (a stream) and "
                "it has no end: set the trainer's max_steps, or take a constant learning rate."
            )
        return factory(optimizer, num_training_steps=int(steps))

    # Validation and test

    def on_validation_start(self) -> None:
        """Leave the time of validation out of the tokens per second."""
        self._throughput.pause()

    def on_validation_end(self) -> None:
        """Count time again."""
        self._throughput.resume()

    def on_validation_epoch_start(self) -> None:
        """Begin with empty metrics."""
        self._begin_evaluation("val")

    def on_test_epoch_start(self) -> None:
        """Begin with empty metrics."""
        self._begin_evaluation("test")

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Take a batch into the metrics of validation."""
        self._evaluate("val", batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Take a batch into the metrics of the test."""
        self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation."""
        self._end_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole test."""
        self._end_evaluation("test")

    def _evaluators(self, stage: Stage) -> tuple[MeanMetric, MetricCollection]:
        return cast(MeanMetric, self._means[stage]), cast(MetricCollection, self._metrics[stage])

    def _begin_evaluation(self, stage: Stage) -> None:
        mean, metrics = self._evaluators(stage)
        # A Trainer in precision bf16-true turns metrics to bfloat16 too, in which counts above 256 are rounded.
        mean.set_dtype(torch.float32)
        # At the start, not the end: what is reset in a trainer.validate, under inference mode, no fit could add to.
        mean.reset()
        metrics.reset()

    def _evaluate(self, stage: Stage, batch: Mapping[str, Tensor]) -> None:
        mean, metrics = self._evaluators(stage)
        total, count, logits = self.loss_sum(batch)[:3]
        mean.update(total / count.clamp(min=1), count)
        if metrics and logits is not None:
            metrics.update(logits.float(), batch["labels"])

    def _end_evaluation(self, stage: Stage) -> None:
        mean, metrics = self._evaluators(stage)
        values = {"loss": mean.compute(), **metrics.compute()}
        values |= self.derived(values)
        # The metrics have joined the processes already; sync_dist only says so to Lightning, which would warn.
        self.log_dict({f"{stage}_{name}": value for name, value in values.items()}, prog_bar=True, sync_dist=True)


def _count_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    if "tokens_in_row" in batch:  # packed rows, which have no mask
        return batch["tokens_in_row"].sum()
    mask = batch.get("attention_mask")
    return (torch.ones_like(batch["input_ids"]) if mask is None else mask).sum()
