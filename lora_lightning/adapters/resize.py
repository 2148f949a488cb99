"""A trained adapter at a lower rank: each layer's update by the best one of that rank.

``ΔW = s · B A`` is cut to its largest singular values, which no other update of that rank comes nearer to (Eckart and
Young 1936). The new factors are ``U √(S/s)`` and ``√(S/s) Vᵀ``, as long as each other, and ``s`` stays: alpha falls
with the rank, so that PEFT computes the same product and training may go on. Names, shapes and settings are those of
the file: no base model is needed.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.adapters.facts import OUTSIDE_FILE, AdapterFacts
from lora_lightning.adapters.folder import check_finite, read_peft_config, read_record, read_weights, write_folder
from lora_lightning.adapters.hub import adapter_folder, copy_tokenizer
from lora_lightning.adapters.pairs import Pair, of_config, pairs_of, refuse_changed_base
from lora_lightning.adapters.spectrum import update_svd, used_rank
from lora_lightning.adapters.tensor_file import read_tensors
from lora_lightning.adapters.written import new_folder, refuse_existing
from lora_lightning.config_checks import check_rank
from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.matching import patterns_for

_DORA = (
    "DoRA divides by the lengths of W + s · B A, which are no longer those of training: magnitudes are kept, and this "
    "is the nearest update, not the nearest weight. Look at the loss"
)


@dataclass(frozen=True)
class Resized:
    """One update before and after.

    Attributes:
        layer: The layer's name.
        was: Its rank before.
        r: Its rank now.
        kept: The share of ``‖ΔW‖²`` that is left, in [0, 1].
        size: ``‖ΔW‖²`` before.
    """

    layer: str
    was: int
    r: int
    kept: float
    size: float


@dataclass(frozen=True)
class ResizeReport:
    """What :func:`resize_adapter` gives back; prints as one line.

    Attributes:
        folder: The new adapter.
        layers: One for each update, in the order of the file.
        parameters: How many values the updates have now.
        parameters_before: How many they had.
        notes: What else there is to know.
    """

    folder: Path
    layers: tuple[Resized, ...]
    parameters: int
    parameters_before: int
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> float:
        """The share of ``Σ ‖ΔW‖²`` over all layers that is left; 1 where no layer has moved."""
        total = math.fsum(each.size for each in self.layers)
        return math.fsum(each.kept * each.size for each in self.layers) / total if total else 1.0

    def __str__(self) -> str:
        """Ranks, size and the share of the update that is kept."""
        worst = min(self.layers, key=lambda each: each.kept)
        return "\n".join(
            [
                f"{len(self.layers)} updates from {_ranks(each.was for each in self.layers)} to "
                f"{_ranks(each.r for each in self.layers)}: {self.parameters:,} parameters, before "
                f"{self.parameters_before:,}; {self.kept:.2%} of ‖ΔW‖² kept (least: {worst.kept:.2%}, {worst.layer})",
                *self.notes,
            ]
        )


@torch.no_grad()
def resize_adapter(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    r: int | None = None,
    *,
    energy: float | None = None,
) -> ResizeReport:
    """Write the best adapter of a lower rank as a new folder.

    What is not an update (biases, modules trained in full, token rows, DoRA's magnitudes, the tokenizer) is taken over
    as it is. A convolution of groups gets a rank that its groups can share, of at least one each.

    Args:
        source: An adapter folder, ours or PEFT's, or one on the Hub: ``owner/name[@revision]``.
        folder: Where to; it must not be there yet.
        r: The new rank; layers of a lower one keep theirs. None leaves it to ``energy``.
        energy: A share in (0, 1] of each layer's ``‖ΔW‖²`` to keep: each gets the lowest rank that does, up to ``r``.

    Returns:
        What was kept of each layer.

    Raises:
        LoraConfigError: ``r`` is above the trained rank, or a number makes no sense.
        AdapterError: The source is no adapter, or damaged; or ``folder`` is there already.
    """
    _check(r, energy)
    refuse_existing(folder)
    place = adapter_folder(source)
    config, weights = read_peft_config(place), read_weights(place)
    check_finite(weights)
    refuse_changed_base(config, str(source))
    tied = _tied(config, weights)
    pairs = pairs_of(config, {key: value for key, value in weights.items() if key not in tied}, str(source))
    trained = max(pair.r for pair in pairs)
    if r is not None and r > trained:
        raise LoraConfigError(
            f"{source} was trained at r={trained}, and its update has no more directions than that to keep: choose r "
            f"of at most {trained}, or train anew with lora.r={r} (got r={r})"
        )
    spectra = {pair.a_key: update_svd(*pair.factors(weights), pair.scaling) for pair in pairs}
    ranks = {pair.a_key: _rank(spectra[pair.a_key][1], pair, r or trained, energy) for pair in pairs}
    new = _at_ranks(pairs, ranks, config)
    cut = {key: value for pair in new for key, value in _factors(pair, spectra[pair.a_key], weights).items()}
    report = ResizeReport(
        folder=Path(folder),
        layers=tuple(_told(old, pair, spectra[pair.a_key][1]) for old, pair in zip(pairs, new, strict=True)),
        parameters=sum(value.numel() for value in cut.values()),
        parameters_before=sum(weights[key].numel() for key in cut),
        notes=(_DORA,) if config.get("use_dora") else (),
    )
    outside = read_tensors(place / OUTSIDE_FILE) if (place / OUTSIDE_FILE).is_file() else {}
    facts = AdapterFacts(
        config=dict(config) | _settings(new, config),
        keys={key: key for key in weights if key not in tied},
        outside=list(outside),
        tied=tied,
        record=read_record(place) | {"resized": {"from": trained, "kept": report.kept}},
    )
    with new_folder(folder) as aside:
        write_folder(facts, weights | cut | outside, aside)
        copy_tokenizer(place, aside)
    return report


def _check(r: int | None, energy: float | None) -> None:
    problems = []
    if r is None and energy is None:
        problems.append("name the new rank, r=8, or the share of the update to keep, energy=0.99")
    if r is not None:
        problems += check_rank("r", r)
    if energy is not None and not 0 < energy <= 1:
        problems.append(f"energy is the share of ‖ΔW‖² to keep, above 0 and up to 1, got {energy}")
    if problems:
        raise LoraConfigError("The adapter cannot be resized so:" + "".join(f"\n  - {each}" for each in problems))


def _tied(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, list]:
    """Keys of a layer that is tied to an embedding, which say what the embedding's say the other way round."""
    if not config.get("ensure_weight_tying"):
        return {}
    found: dict[str, list] = {}
    for a_key in (key for key in weights if key.endswith(".lora_embedding_A")):
        own = {"lora_B": a_key, "lora_A": f"{a_key[:-1]}B"}
        for key in (key for key in weights if key.endswith((".lora_A.weight", ".lora_B.weight"))):
            source = own[key.split(".")[-2]]
            if torch.equal(weights[key], weights[source].t()):
                found[key] = [source, True]
    return found


def _rank(sigma: Tensor, pair: Pair, most: int, energy: float | None) -> int:
    """The rank that a layer gets, from its singular values ``(n, k)``."""
    k = max(1, min(most, pair.r) // pair.groups)
    if energy is not None:
        together = sigma.square().sum(0).sqrt()  # its updates have one rank
        k = min(k, max(1, int(used_rank(together, energy))))
    return k * pair.groups


def _at_ranks(pairs: Sequence[Pair], ranks: Mapping[str, int], config: Mapping[str, Any]) -> list[Pair]:
    """Each pair at its new rank and with the alpha that keeps its scale; one rank for what one setting means."""
    shared: dict[tuple[str, ...], int] = {}
    for pair in pairs:
        shared[pair.meant] = max(shared.get(pair.meant, 0), ranks[pair.a_key])
    plain, found = of_config(config), []
    for pair in pairs:
        r = shared[pair.meant]
        share = r / pair.r
        alpha = pair.alpha * (math.sqrt(share) if plain.use_rslora else share)
        alpha = int(alpha) if float(alpha).is_integer() else alpha
        found.append(replace(pair, r=r, alpha=alpha, scaling=plain.scaling(r, alpha)))
    return found


def _factors(pair: Pair, spectrum: tuple[Tensor, Tensor, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``√(S/s) Vᵀ`` and ``U √(S/s)``, cut to a rank, as the file has them."""
    u, sigma, vt = spectrum
    k = pair.r // pair.groups
    if not sigma.any():  # never trained: two factors of zeros never would be
        a, b = pair.factors(weights)
        return pair.tensors(a[:, :k], b.new_zeros(*b.shape[:2], k), weights)
    root = (sigma[:, :k] / abs(pair.scaling)).sqrt()
    a, b = root[..., None] * vt[:, :k], u[..., :k] * math.copysign(1, pair.scaling) * root[:, None]
    missing = k - root.shape[1]  # a rank above both sides of a layer
    return pair.tensors(F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing)), weights)


def _told(old: Pair, new: Pair, sigma: Tensor) -> Resized:
    energy = sigma.square()
    size = float(energy.sum())
    kept = float(energy[:, : new.r // new.groups].sum()) / size if size else 1.0
    return Resized(new.layer, old.r, new.r, kept, size)


def _settings(pairs: Sequence[Pair], config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``adapter_config.json`` by which a reader gives each layer its rank and scale."""
    by_name = {name: (pair.r, pair.alpha) for pair in pairs for name in pair.meant}
    (r, alpha), _ = Counter(by_name.values()).most_common(1)[0]
    fields: dict[str, Any] = {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": patterns_for({name: each[0] for name, each in by_name.items()}, r),
        "alpha_pattern": patterns_for({name: each[1] for name, each in by_name.items()}, alpha),
        "init_lora_weights": True,  # how it began says nothing any more
    }
    return fields | {name: None for name in ("eva_config", "corda_config", "lora_ga_config") if name in config}


def _ranks(values: Iterable[int]) -> str:
    least, *_, most = [*sorted(values)] * 2
    return f"r={least}" if least == most else f"r={least} to {most}"
