"""The place in a model's layers, which one adapter has at a time, or the sum of several, or none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_lightning.adapters.fingerprint import fingerprint
from lora_lightning.adapters.held import Held, held_in, let_train, put_in, take_out
from lora_lightning.adapters.summed import summed
from lora_lightning.errors import AdapterError
from lora_lightning.injection.names import find_root
from lora_lightning.injection.state import injected_roots, lora_parameters, record_of


@dataclass
class _Inside:
    """What is in the model: which adapters, them as one, and whether it trains."""

    names: tuple[str, ...]
    held: Held
    trains: bool
    trained: bool = False  # since it was put in, and is not any more
    gradients: dict[str, Tensor | None] = field(default_factory=dict)  # while it is out for a moment

    @property
    def has_news(self) -> bool:
        """Whether there may be values in the base's own tensors that only the model has."""
        moving = self.held.record.statistics.keys() - self.held.record.still
        return len(self.names) == 1 and (self.trained or self.trains_now) and bool(self.held.full or moving)

    @property
    def trains_now(self) -> bool:
        """Whether its parameters do; those keep that where somebody else takes it off."""
        return any(parameter.requires_grad for parameter in self.held.low.values())


class Place:
    """What is in a model of the adapters beside it.

    Args:
        model: The model.
        held: The adapters by name, kept up to date with what comes out of the model.
        offload: Move to the CPU what comes out to stay out.
    """

    def __init__(self, model: nn.Module, held: dict[str, Held], offload: bool) -> None:
        self.model = model
        self._held = held
        self._offload = offload
        self._inside: _Inside | None = None
        self._lent = False
        # That of the plain base, once it has been seen.
        self._base = None if injected_roots(model) else fingerprint(find_root(model)[1])

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are in the model."""
        return self._inside.names if self._inside is not None and injected_roots(self.model) else ()

    def adopt(self, name: str) -> None:
        """Give the adapter that is in the model already a name."""
        held = self._held[name] = held_in(self.model)
        self._inside = _Inside((name,), held, trains=False)  # looked at when it is taken out

    def change(self, names: tuple[str, ...], *, trains: bool = False) -> None:
        """Have these in the model and no others; all or nothing."""
        if len(set(names)) < len(names):
            raise AdapterError(f"each adapter is in the sum once, got {', '.join(names)}")
        self.settle(same_base=True)
        if self._inside is not None and self._inside.names == names:
            self._inside.trained |= self._inside.trains_now
            let_train(self.model, trains)
            return
        with torch.inference_mode(False):  # what moves here may be wanted in training later
            before = self._take_out(self._offload)
            try:
                held = {name: self._held[name] for name in names}
                if names:
                    together = held[names[0]] if len(names) == 1 else summed(held, self.model)
                    self._put_in(_Inside(names, together, trains))
            except BaseException:
                self._put_in(before)
                raise

    @contextlib.contextmanager
    def emptied(self) -> Iterator[None]:
        """The plain base inside the ``with`` block; what was in it is in it again afterwards."""
        self.settle()
        with torch.inference_mode(False):
            before = self._take_out(offload=False)
            try:
                yield
            finally:
                self._put_in(before)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """The same for somebody who computes with it: nothing may be put in meanwhile."""
        self.settle(same_base=True)
        before = self._take_out(offload=False)
        self._lent = True
        try:
            yield
        finally:
            self._lent = False
            self._put_in(before)

    def take_out_new(self) -> Held:
        """The adapter that somebody has put into the emptied model."""
        return take_out(self.model, offload=self._offload)

    def _take_out(self, offload: bool) -> _Inside | None:
        now, self._inside = self._inside, None
        if now is None:
            return None
        now.trains = now.trains_now
        now.gradients = {name: parameter.grad for name, parameter in lora_parameters(self.model).items()}
        now.held = take_out(self.model, offload=offload)
        if len(now.names) == 1:
            self._held[now.names[0]] = now.held
        self._base = self._base or fingerprint(find_root(self.model)[1])
        return now

    def _put_in(self, now: _Inside | None) -> None:
        if now is not None:
            if len(now.names) == 1:
                now.held = self._held[now.names[0]]
            put_in(self.model, now.held, trains=now.trains)
            for name, parameter in lora_parameters(self.model).items():
                parameter.grad = now.gradients.get(name, parameter.grad)
            now.gradients, now.trained = {}, False
        self._inside = now

    def settle(self, *, same_base: bool = False) -> None:
        """Notice what others have done to the model meanwhile.

        Raises:
            AdapterError: If that was another adapter, or with ``same_base`` another base; or if what an adapter had
                trained in full went with it.
        """
        if self._lent:
            raise AdapterError("the model computes rows: leave the with block of rows() before")
        roots = list(injected_roots(self.model).values())
        if roots and (self._inside is None or record_of(roots[0]) is not self._inside.held.record):
            raise AdapterError(
                "the model has an adapter that none of these adapters is: unload_lora(model) first, or save it and "
                "load(name, folder)"
            )
        if roots:
            return
        if self._inside is not None and self._inside.has_news and (name := self._inside.names[0]) in self._held:
            raise AdapterError(
                f"{name!r} was there to train when unload_lora or merge_lora took it off; what it trained in the "
                "base's own tensors (heads, biases, token rows, running statistics) went with that, and what is left "
                f"is not the adapter: delete({name!r}). Before either, adapters.disable() or adapters.save(folder) "
                "keeps all of it"
            )
        self._inside = None
        if same_base and self._base is not None and fingerprint(find_root(self.model)[1]) != self._base:
            raise AdapterError(
                "the base is another one than these adapters were made for (was one merged into it?): save those that "
                "are in no folder yet, make Adapters(model) anew and load what fits the model as it is"
            )
