"""Where a layer stands in a model, from its name: which kind of layer it is, and in which block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple


class Place(NamedTuple):
    """A cell of a table that has a line for each kind of layer and a column for each block.

    Attributes:
        kind: Short, and unique among the names it was told with.
        block: The first number in the name; None where there is none.
    """

    kind: str
    block: int | None


def places_of(names: Iterable[str]) -> dict[str, Place]:
    """The place of each layer. Layers that differ in further numbers only (experts) have one place.

    A kind is the last part of a name, or as much before it as it takes to tell it from others.

    >>> places_of(["layers.0.attn.q_proj", "layers.1.attn.q_proj", "layers.0.mlp.experts.3.up", "head"])["head"]
    Place(kind='head', block=None)
    >>> [place.kind for place in places_of(["encoder.0.q", "decoder.0.q", "decoder.0.cross.q"]).values()]
    ['encoder.q', 'decoder.q', 'cross.q']
    """
    parts = {name: _split(name) for name in names}
    kinds = {kind for kind, _ in parts.values()}
    of_ending: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    for kind in kinds:
        for start in range(len(kind)):
            of_ending[kind[start:]].add(kind)
    short = {}
    for kind in kinds:
        # The whole name may be the ending of a longer one; nothing shorter tells it from that.
        endings = [kind[start:] for start in range(len(kind) - 1, -1, -1)]
        short[kind] = ".".join(next((each for each in endings if of_ending[each] == {kind}), kind))
    return {name: Place(short[kind], block) for name, (kind, block) in parts.items()}


def _split(name: str) -> tuple[tuple[str, ...], int | None]:
    """The words of a name, and the first number in it."""
    parts = name.split(".")
    numbers = [int(part) for part in parts if part.isdigit()]
    words = tuple(part for part in parts if not part.isdigit())
    return words or ("layer",), numbers[0] if numbers else None
