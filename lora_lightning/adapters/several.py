"""Several adapters of one model: held by name beside it, put into its layers when they are wanted.

A layer has one adapter, and its forward knows of no other. Several that act at once are one adapter of the summed rank,
``[s₁A₁; s₂A₂]`` and ``[B₁, B₂]``, which is exactly the sum of their updates.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import nn

from lora_lightning.adapters.combine import Combination
from lora_lightning.adapters.facts import CONFIG_FILE, adapter_state, describe
from lora_lightning.adapters.folder import load_adapter, write_folder
from lora_lightning.adapters.held import Held, put_in
from lora_lightning.adapters.peft_notes import warn_of_peft
from lora_lightning.adapters.per_row import per_row
from lora_lightning.adapters.place import Place
from lora_lightning.adapters.summed import weighted
from lora_lightning.adapters.swap import make_room, refill
from lora_lightning.config import LoraConfig
from lora_lightning.errors import AdapterError, did_you_mean
from lora_lightning.injection import LoraReport, inject_lora, report_of
from lora_lightning.injection.names import unwrap
from lora_lightning.injection.state import injected_roots, lora_state_dict, the_root
from lora_lightning.layers.per_row import BASE, Rows

DEFAULT = "default"


class Adapters:
    """Adapters of one model by name, of which one, several or none are in its layers.

    Each has a config of its own: ranks, targets, DoRA, modules trained in full. While one is in, everything works as
    with a single adapter: :func:`lora_disabled`, :func:`merge_lora`, :func:`save_adapter`, checkpoints; after
    :func:`unload_lora` none is. What is merged makes the model another base, for which adapters have to be loaded anew.

    Args:
        model: A base model, or one that has an adapter, or a LightningModule around it.
        name: What to call the adapter that the model has already.
        offload: Keep the adapters that are not in the model on the CPU.

    Raises:
        AdapterError: If several modules in the model have adapters.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    >>> adapters = Adapters(model)
    >>> _ = adapters.add("math", LoraConfig(r=2)), adapters.add("chat", LoraConfig(r=1, target_modules=["0"]))
    >>> adapters.set("math", "chat")
    >>> adapters
    Adapters(math (active), chat (active))
    """

    def __init__(self, model: nn.Module, *, name: str = DEFAULT, offload: bool = True) -> None:
        self.model = unwrap(model)
        self._held: dict[str, Held] = {}
        self._place = Place(self.model, self._held, offload)
        if injected_roots(self.model):
            self._free(name)
            self._place.adopt(name)

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters, in the order in which they came."""
        return tuple(self._held)

    @property
    def active(self) -> tuple[str, ...]:
        """Those that are in the model."""
        return self._place.names

    def __contains__(self, name: object) -> bool:
        """Whether there is an adapter of that name."""
        return name in self._held

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self._held)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._held)

    def __repr__(self) -> str:
        """Their names, and which are in the model."""
        listed = [f"{name} (active)" if name in self.active else name for name in self._held]
        return f"{type(self).__name__}({', '.join(listed)})"

    def config(self, name: str) -> LoraConfig:
        """The config of one.

        Args:
            name: What it is called here.
        """
        return self._get(name).config

    # ---- coming and going

    def add(self, name: str, config: LoraConfig | Mapping[str, object], *, seed: int | None = None) -> LoraReport:
        """Make a fresh adapter and let it train, alone in the model.

        Args:
            name: What to call it.
            config: A :class:`LoraConfig`, or a mapping of its fields.
            seed: Seed of its first values; None takes ``PL_GLOBAL_SEED``, else 0.

        Returns:
            What was adapted.

        Raises:
            LoraConfigError: If the config does not fit; all is as it was then.
        """
        self._free(name)
        self._place.settle(same_base=True)  # before there is anything that could be left behind
        with self._place.emptied():
            report = inject_lora(self.model, config, seed=seed)
            self._held[name] = self._place.take_out_new()
        self.train(name)
        return report

    def load(self, name: str, folder: str | os.PathLike[str], *, room: int | None = None) -> LoraReport:
        """Read an adapter folder, ours or PEFT's; what is in the model stays in it.

        Args:
            name: What to call it.
            folder: The folder.
            room: Fill its ranks up with zeros to this one, so that adapters of up to that rank can be swapped in.

        Returns:
            What was adapted.

        Raises:
            AdapterError: If it does not fit; all is as it was then.
        """
        self._free(name)
        with self._place.emptied():
            report = load_adapter(self.model, folder)
            held = self._place.take_out_new()
            if room is not None:
                make_room(held, self.model, room)
            self._held[name] = held
        return report

    def load_all(self, folder: str | os.PathLike[str]) -> tuple[str, ...]:
        """Read what :meth:`save` (or PEFT) wrote: ``"default"`` from the folder itself, others from folders in it.

        Args:
            folder: The folder.

        Returns:
            Their names.

        Raises:
            AdapterError: If there is none, or one does not fit; those before it are there then.
        """
        top = Path(folder)
        found = {path.parent.name: path.parent for path in sorted(top.glob(f"*/{CONFIG_FILE}"))}
        if (top / CONFIG_FILE).is_file():
            if DEFAULT in found:
                raise AdapterError(
                    f"{top} and {found[DEFAULT]} would both be {DEFAULT!r}: load(name, folder) each of them under a "
                    "name of its own, or move one away"
                )
            found = {DEFAULT: top} | found
        if not found:
            raise AdapterError(f"{top} holds no adapter, and no folder in it does")
        for name in found:
            self._free(name)
        for name, path in found.items():
            self.load(name, path)
        return tuple(found)

    def save(
        self, folder: str | os.PathLike[str], names: Sequence[str] | None = None, *, overwrite: bool = False
    ) -> list[Path]:
        """Write adapters as PEFT lays them out: ``"default"`` into the folder itself, others into folders in it.

        Args:
            folder: Made if need be.
            names: Which; all by default.
            overwrite: Replace adapters that are there already.

        Returns:
            Their folders.
        """
        written = []
        with self._place.emptied():
            for name in self.names if names is None else names:
                place = Path(folder) if name == DEFAULT else Path(folder) / name
                put_in(self.model, self._get(name))
                try:
                    written.append(self._write(self._held[name], place, overwrite=overwrite))
                finally:
                    self._held[name] = self._place.take_out_new()
        return written

    def delete(self, name: str) -> None:
        """Let an adapter go; where it was one of those in the model, the others stay.

        Args:
            name: What it is called here.
        """
        self._get(name)
        if name in self.active:
            self._place.change(tuple(other for other in self.active if other != name))
        del self._held[name]

    # ---- which are in the model

    def set(self, *names: str) -> None:
        """Have these adapters in the model, frozen: one, or the sum of several; with no name none.

        Args:
            *names: What they are called here.

        Raises:
            AdapterError: If there is no such adapter, or their sum is no adapter (DoRA, two trained heads).
        """
        for name in names:
            self._get(name)
        self._place.change(names)

    def train(self, name: str) -> None:
        """Have one adapter in the model and let it train: its parameters are those of :func:`lora_parameters`.

        Args:
            name: What it is called here.
        """
        self._get(name)
        self._place.change((name,), trains=True)

    def disable(self) -> None:
        """Have none in the model: the base, as :func:`unload_lora` leaves it."""
        self._place.change(())

    def report(self) -> LoraReport:
        """What is in the model."""
        return report_of(self.model)

    @contextlib.contextmanager
    def rows(self, names: Sequence[str], *, beams: int = 1) -> Iterator[Rows]:
        """Compute each row of a batch with an adapter of its own, inside the ``with`` block and in eval mode.

        Args:
            names: For each row an adapter, or ``"__base__"``.
            beams: How many rows generation makes of each: ``num_beams``, or ``num_return_sequences`` where it samples.

        Yields:
            Whose the rows are; its ``assign`` names those of another batch, of the same adapters.
        """
        for name in () if isinstance(names, str) else names:
            if name != BASE:
                self._get(name)
        with self._place.lent(), per_row(self.model, self._held, names, beams) as rows:
            yield rows

    # ---- changing adapters

    def swap(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Put the values of an adapter folder into an adapter's tensors; what was compiled with it stays compiled.

        The adapter keeps its layers, ranks, scales and dropout: smaller ranks are filled up with zeros, layers that the
        folder has not do nothing, and another scale goes into ``B``. ``load(…, room=r)`` makes room for larger ranks.

        Args:
            name: Whose tensors get other values.
            folder: An adapter folder, ours or PEFT's, or one on the Hub.

        Raises:
            AdapterError: If it does not fit; nothing is changed then.
        """
        held = self._get(name)
        self._place.settle()
        if name in self.active and len(self.active) > 1:
            raise AdapterError(f"{name} is in the model as part of a sum: set({name!r}) first, then swap")
        refill(held, self.model, folder, lora_state_dict(self.model) if name in self.active else None)

    def add_weighted(
        self,
        name: str,
        weights: Mapping[str, float],
        *,
        how: str = "svd",
        density: float | None = None,
        majority_sign_method: str = "total",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_driver: str | None = None,
    ) -> None:
        """Make one adapter of several; what is in the model stays in it.

        Args:
            name: What to call it.
            weights: How much each counts; below zero it is taken away. The order is that of random draws.
            how: PEFT's ``combination_type``: see :mod:`lora_lightning.adapters.combine`.
            density: See :class:`~lora_lightning.adapters.combine.Combination`, as for all that follow.
            majority_sign_method: See there.
            svd_rank: See there.
            svd_clamp: See there.
            svd_driver: See there.

        Raises:
            LoraConfigError: If the settings do not go together, or the ranks differ where they must not.
            AdapterError: If the adapters cannot be combined.
        """
        self._free(name)
        parts = {each: self._get(each) for each in weights}
        way = Combination(how, density, majority_sign_method, svd_rank, svd_clamp, svd_driver)
        with self._place.emptied():
            self._held[name] = weighted(parts, weights, way, self.model)

    # ---- what this is made of

    def _write(self, held: Held, place: Path, *, overwrite: bool) -> Path:
        """As :func:`save_adapter`, over the base that the adapter was made for: one may have been merged into it."""
        facts, state = describe(self.model), adapter_state(self.model)
        facts.record["base_fingerprint"] = held.base
        warn_of_peft(the_root(self.model)[1], str(place), written_here=True)
        return write_folder(facts, state, place, overwrite=overwrite)

    def _get(self, name: str) -> Held:
        if name not in self._held:
            there = ", ".join(self._held) or "none"
            raise AdapterError(f"no adapter {name!r}{did_you_mean(name, self._held)}; there are: {there}")
        return self._held[name]

    def _free(self, name: str) -> None:
        if name in self._held:
            raise AdapterError(f"there is an adapter {name!r} already: delete({name!r}) it, or swap({name!r}, folder)")
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w .+=-]*", name) or name == BASE:
            raise AdapterError(
                f"an adapter's name is a folder's name too: letters, digits and . _ - + =, not {BASE!r}; got {name!r}"
            )
