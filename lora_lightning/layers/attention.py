"""Adapted ``nn.MultiheadAttention``, which reads the weights of its projections and calls no layer.

So the attention is shown the adapted weights while its own forward runs, with all that this can do (masks, weights of
the attention, the fused path of inference), and gradients go back through them. The weights are made anew in every
forward, in the dtype that they are stored in: an update too small for half precision to show is not seen in it.
There is no place for ``lora_dropout`` here, and it is not used, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from lora_lightning.layers.base import LoraLayer
from lora_lightning.layers.showing import Shown, showing

if TYPE_CHECKING:
    _Attention = nn.MultiheadAttention
else:
    _Attention = object


class LoraReadsOutProj(_Attention):
    """An attention of which only ``out_proj`` is adapted: not a layer with an adapter, but one that reads another's."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``."""
        with showing(_of_out_proj(self)):
            return super().forward(*args, **kwargs)


class LoraOverAttention(LoraLayer):
    """Adapter over an attention's in-projection, of queries, keys and values at once; ``out_proj`` has one of its own.

    ``A`` is ``(r, embed)`` and ``B`` ``(3 embed, r)``, queries first.
    """

    lora_kind = "MultiheadAttention"
    lora_base_class: ClassVar[type[nn.Module]] = nn.MultiheadAttention
    lora_starts: ClassVar[tuple[bool | str, ...]] = (True, False, "gaussian", "orthogonal")
    lora_drops: ClassVar[bool] = False
    lora_folds = ("in_proj_weight",)
    in_proj_weight: Tensor

    @staticmethod
    def lora_sides(layer: nn.Module) -> tuple[int, int]:
        """``(embed, 3 embed)``."""
        embed = cast("nn.MultiheadAttention", layer).embed_dim
        return embed, 3 * embed

    @staticmethod
    def lora_weight_of(layer: nn.Module) -> Tensor:
        """``in_proj_weight``."""
        return cast("Tensor", layer.in_proj_weight)

    @classmethod
    def lora_hindrance(cls, layer: nn.Module) -> str | None:
        """Queries, keys and values have to come from one weight."""
        attention = cast("nn.MultiheadAttention", layer)
        if attention.in_proj_weight is None:
            return (
                f"its keys (kdim={attention.kdim}) or values (vdim={attention.vdim}) are of another size than its "
                f"queries ({attention.embed_dim}), so that it has three weights in place of one: leave it out, or name "
                "its out_proj in target_modules to adapt that alone"
            )
        if "in_proj_weight" not in attention._parameters:
            return (
                "its in_proj_weight is recomputed before each forward (weight_norm, pruning): make it permanent first, "
                "with torch.nn.utils.remove_weight_norm(layer, 'in_proj_weight') or what undoes the other"
            )
        if not isinstance(attention.out_proj, nn.Linear):
            return f"its out_proj is a {type(attention.out_proj).__name__}, which is not an nn.Linear: leave it out"
        return super().lora_hindrance(layer)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # the name under which a layer's weight is asked for
        """``in_proj_weight``, ``(3 embed, embed)``."""
        return self.in_proj_weight

    def lora_weight_delta(self) -> Tensor:
        """``s · B A``: ``(3 embed, embed)``."""
        return self.lora_scaling * (self.lora_B @ self.lora_A)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As ``nn.MultiheadAttention``: the outputs, and the weights of the attention where they are asked for."""
        with showing(self._shown()):
            return super(LoraLayer, self).forward(*args, **kwargs)

    def extra_repr(self) -> str:
        """Rank and scale of the in-projection."""
        return f"r={self.lora_r}, scaling={self.lora_scaling:g}"

    def _shown(self) -> Iterator[Shown]:
        if self.lora_enabled:
            yield self, "in_proj_weight", self.lora_shown()["weight"]
        yield from _of_out_proj(self)


class LoraMultiheadAttention(LoraOverAttention, nn.MultiheadAttention):  # type: ignore[misc]  # forward takes more
    """``nn.MultiheadAttention`` with low-rank updates of its in-projection, and of its out-projection."""


def _of_out_proj(attention: nn.Module) -> Iterator[Shown]:
    layer = attention.out_proj
    if isinstance(layer, LoraLayer) and layer.lora_enabled:
        for name, value in layer.lora_shown().items():
            yield layer, name, value
