"""One frozen model with the adapters of many jobs on it: one forward and backward for all their batches at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.names import canonical_modules, unwrap
from lora_lightning.injection.state import lora_layers
from lora_lightning.injection.together import compute_apart, compute_together
from lora_lightning.layers import LoraLinear
from lora_lightning.layers.packed import PackedLoraLinear, Seating, Stack, pack, unpack
from lora_lightning.sweeps.packed.hindrances import why_not_packed
from lora_lightning.sweeps.packed.shell import shell_of
from lora_lightning.tasks.loss import IGNORED, token_losses

__all__ = ["PackedModel", "SlotLoss", "unseat", "why_not_packed"]

_FILLING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}


class SlotLoss(NamedTuple):
    """What one job gets for its batch."""

    total: Tensor
    """The sum of the losses of its labels, without a graph."""
    terms: Tensor
    """How many they are (int64)."""
    gradients: list[tuple[nn.Parameter, Tensor]]
    """Of ``total``, for each of its parameters that trains, in the parameter's own layout; empty in evaluation."""


class PackedModel:
    """A base model that many jobs share, each with an adapter of its own in a slot of its own.

    Args:
        base: The model without adapters. It is not changed; what computes here is a shell of it.
    """

    def __init__(self, base: nn.Module) -> None:
        self.model = shell_of(base).requires_grad_(False)
        self._seating = Seating()
        self._models: list[nn.Module] = []
        self._layers: list[list[LoraLinear]] = []
        self._stacks: list[Stack] = []
        self._views: list[tuple[nn.Parameter, int]] = []
        self._dropout: list[float] = []
        self._is_settled = False

    def seat(self, models: Sequence[nn.Module]) -> None:
        """Give each model a slot: from now on its adapter's parameters are views of the stacks here.

        Parameters keep their identity and their values, so that optimizers go on; those of models that were seated
        before and are no longer get memory of their own again.

        Args:
            models: Injected shells of the base, in the order of their slots; none lets all go.

        Raises:
            LoraConfigError: A model cannot be seated.
        """
        self._check(models)
        for model in self._models:
            if not any(model is other for other in models):
                unseat(model)
        self._clear()
        adapters = [dict(_linears(model)) for model in models]
        modules = dict(canonical_modules(self.model))
        for name in dict.fromkeys(name for each in adapters for name in each):
            pack(modules[name])
        compute_together(self.model)
        names = {id(module): name for name, module in modules.items()}
        for layers in _by_input(modules.values()):
            own = [[each.get(names[id(layer)]) for layer in layers] for each in adapters]
            self._stacks.append(Stack(layers, own, self._seating))
        self._models = list(models)
        self._layers = [list(each.values()) for each in adapters]
        self._views = [
            (p, p.data_ptr()) for each in adapters for layer in each.values() for p in layer.lora_own.values()
        ]
        self._dropout = [max((layer.lora_dropout for layer in each.values()), default=0.0) for each in adapters]

    def losses(
        self,
        batches: Mapping[int, Mapping[str, Tensor]],
        *,
        train: bool,
        drawing: Callable[[int], AbstractContextManager[None]],
    ) -> dict[int, SlotLoss]:
        """Score the batches of several slots at once; each gets the losses and gradients of a run of its own.

        Args:
            batches: The batch of each slot: ``input_ids`` and ``labels``, and ``attention_mask`` where the others have
                one too, each (B, T), padded at the right. All have the same B; a narrower one is padded further.
            train: With dropout and gradients.
            drawing: Makes torch's generators those of a slot's job.

        Returns:
            What each slot gets.

        Raises:
            LoraConfigError: The batches do not go together, or a model's adapter is switched off.
        """
        slots = tuple(sorted(batches))
        self._check_slots(slots)
        self._keep_seats()
        rows, widths, batch = _side_by_side([batches[slot] for slot in slots])
        if self.model.training != train:
            self.model.train(train)
        self._settle(batch)
        seating = self._seating
        seating.slots, seating.rows, seating.widths, seating.drawing = slots, rows, widths, drawing
        seating.dropout = tuple(self._dropout[slot] if train else 0.0 for slot in slots)
        with torch.set_grad_enabled(train):
            losses_K, outputs = token_losses(self.model, batch)
            if getattr(outputs, "aux_loss", None) is not None:
                raise LoraConfigError(
                    f"{type(self.model).__name__} adds a loss over all rows to that of its labels, so that jobs would "
                    "be mixed: set its router_aux_loss_coef to 0 and output_router_logits to false, or train one job "
                    "at a time"
                )
            counts_n = (batch["labels"][:, 1:] != IGNORED).view(len(slots), -1).sum(1)
            totals = [part.sum() for part in losses_K.split(counts_n.tolist())]
            found = self._gradients(totals) if train else {slot: [] for slot in slots}
        return {
            slot: SlotLoss(total.detach(), terms, found[slot])
            for slot, total, terms in zip(slots, totals, counts_n.unbind(), strict=True)
        }

    def _check_slots(self, slots: Sequence[int]) -> None:
        there = range(len(self._models))
        if not slots or not set(slots) <= set(there):
            raise LoraConfigError(
                f"batches are given by slot, 0 to {len(there) - 1}, got {', '.join(map(str, slots)) or 'none'}"
                if there
                else "no model has been seated: call seat(models) before losses(batches)"
            )
        for slot in slots:
            if not all(layer.lora_enabled for layer in self._layers[slot]):
                raise LoraConfigError(
                    f"job {slot} of the packed jobs has its adapter switched off (lora_disabled): its base alone is "
                    "computed on the model itself"
                )

    def _gradients(self, totals: Sequence[Tensor]) -> dict[int, list[tuple[nn.Parameter, Tensor]]]:
        leaves = [leaf for stack in self._stacks for leaf in stack.leaves]
        found: dict[int, list[tuple[nn.Parameter, Tensor]]] = {slot: [] for slot in range(len(self._models))}
        if leaves:
            grads = torch.autograd.grad(torch.stack(list(totals)).sum(), leaves, allow_unused=True)
            of = {id(leaf): grad for leaf, grad in zip(leaves, grads, strict=True)}
            for slot, parameter, gradient in itertools.chain.from_iterable(each.gradients(of) for each in self._stacks):
                found[slot].append((parameter, gradient))
        return found

    def _settle(self, batch: Mapping[str, Tensor]) -> None:
        """Find out on two tokens what the model does to its head's products; it may take two runs, and so two draws."""
        if not self._is_settled:
            seating = self._seating
            few = {key: value[:1, :2] for key, value in batch.items() if key != "attention_mask"}
            seating.slots, seating.rows, seating.widths, seating.dropout = (0,), 1, (few["input_ids"].shape[1],), (0.0,)
            with torch.no_grad():
                token_losses(self.model, {**few, "labels": few["input_ids"]})
            self._is_settled = True

    def _keep_seats(self) -> None:
        """Seat everybody anew where a parameter has been moved elsewhere meanwhile (``.to()``, other values shown)."""
        if any(parameter.data_ptr() != pointer for parameter, pointer in self._views):
            self.seat(self._models)

    def _clear(self) -> None:
        compute_apart(self.model)
        for module in self.model.modules():
            if isinstance(module, PackedLoraLinear):
                unpack(module)
        self._models, self._layers, self._stacks, self._views, self._dropout = [], [], [], [], []

    def _check(self, models: Sequence[nn.Module]) -> None:
        modules = dict(canonical_modules(self.model))
        for slot, model in enumerate(models):
            why = why_not_packed(model) or _why_not_of(modules, model)
            if why is not None:
                raise LoraConfigError(f"job {slot} of the packed jobs cannot be trained with others: {why}")


def unseat(model: nn.Module) -> None:
    """Give an adapter's parameters memory of their own again, in the same layout, so that their optimizer goes on."""
    for _, layer in lora_layers(model):
        for parameter in layer.lora_own.values():
            if parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size():
                parameter.data = parameter.detach().clone()
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()


def _linears(model: nn.Module) -> list[tuple[str, LoraLinear]]:
    return [(name, layer) for name, layer in lora_layers(unwrap(model)) if isinstance(layer, LoraLinear)]


def _why_not_of(modules: Mapping[str, nn.Module], model: nn.Module) -> str | None:
    """Whether a model's adapted layers are over the memory of the packed model's."""
    for name, layer in _linears(model):
        ours = getattr(modules.get(name), "weight", None)
        if ours is None or ours.data_ptr() != layer.weight.data_ptr() or ours.dtype != layer.weight.dtype:
            return f"its layer {name} is not of the base model in memory, but of a copy or of another one"
    return None


def _by_input(modules: Iterable[nn.Module]) -> list[list[PackedLoraLinear]]:
    """Packed layers, those of one group together."""
    found: list[list[PackedLoraLinear]] = []
    for module in modules:
        if isinstance(module, PackedLoraLinear):
            group = module.lora_group
            if group is None:
                found.append([module])
            elif group.members[0] is module:
                found.append(list(group.members))
    return found


def _side_by_side(batches: Sequence[Mapping[str, Tensor]]) -> tuple[int, tuple[int, ...], dict[str, Tensor]]:
    """Rows of each batch, its width, and all batches as one."""
    keys = set(batches[0])
    others = sorted(set().union(*batches) - _FILLING.keys())
    if others or not {"input_ids", "labels"} <= keys or any(set(each) != keys for each in batches):
        raise LoraConfigError(
            "jobs are trained together on batches of input_ids, labels and, all or none of them, attention_mask; got "
            + " and ".join(sorted({", ".join(sorted(each)) for each in batches}))
            + (
                f". What {', '.join(others)} would mean for the others is not known: train these alone"
                if others
                else ""
            )
        )
    sizes = [len(each["input_ids"]) for each in batches]
    if len(set(sizes)) > 1:
        raise LoraConfigError(
            f"jobs that are trained together have batches of one size, got {', '.join(map(str, sizes))} rows: set the "
            "same data.batch_size for them, and data.drop_last=true where the last batch of an epoch is smaller"
        )
    widths = tuple(each["input_ids"].shape[1] for each in batches)
    whole = max(widths)
    joined = {
        key: torch.cat(
            [pad(each[key], (0, whole - width), value=filling) for each, width in zip(batches, widths, strict=True)]
        )
        for key, filling in _FILLING.items()
        if key in keys
    }
    return sizes[0], widths, joined
