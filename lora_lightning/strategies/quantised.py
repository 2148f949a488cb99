"""Which quantised bases can be spread over processes, and why others cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.materialise import low_rank_ids
from lora_lightning.injection.names import canonical_modules

_REMEDY = "Use strategy='ddp', one device, or a base that is not quantised"


def check_quantised(strategy_name: str, model: nn.Module) -> None:
    """Refuse a quantised base under a strategy that would break it, most often without an error.

    Args:
        strategy_name: Lightning's class: ``FSDPStrategy`` or ``ModelParallelStrategy``; others keep layers whole.
        model: A network, injected or not, sharded or not.

    Raises:
        LoraConfigError: With the layer and the reason.
    """
    rules = {"FSDPStrategy": _under_fsdp, "ModelParallelStrategy": _under_model_parallel}
    if strategy_name not in rules:
        return
    for name, reason in rules[strategy_name](model):
        raise LoraConfigError(f"{strategy_name} cannot spread {name}: {reason}")


def _under_fsdp(model: nn.Module) -> Iterator[tuple[str, str]]:
    """FSDP flattens the parameters of a unit into one floating-point tensor of one dtype."""
    adapters = low_rank_ids(model)  # these are left out of the flat parameters
    others = Counter(
        str(p.dtype)
        for module in model.modules()
        if not _is_bnb(module, "Linear4bit")
        for p in module.parameters(recurse=False)
        if id(p) not in adapters and p.is_floating_point()
    )
    for name, module in canonical_modules(model):
        weight = module._parameters.get("weight")
        if _is_bnb(module, "Linear8bitLt"):
            yield (
                name,
                "bitsandbytes' 8-bit weights are whole numbers, with statistics beside them that FSDP neither "
                f"flattens nor shards. {_REMEDY}",
            )
        elif _is_bnb(module, "Linear4bit") and weight is not None:
            stored = str(weight.dtype)
            most = others.most_common(1)[0][0] if others else stored
            if not weight.is_floating_point() or any(dtype != stored for dtype in others):
                yield (
                    name,
                    f"its 4-bit values are stored as {stored} and the rest of the base as {', '.join(others)}, and "
                    "FSDP flattens tensors of one floating-point dtype only. Load it with "
                    f"BitsAndBytesConfig(bnb_4bit_quant_storage={most}) and dtype={most}",
                )
        for p in module.parameters(recurse=False):
            if kind := _foreign(p):
                yield name, f"its weight is a {kind}, a tensor class that FSDP cannot flatten. {_REMEDY}"


def _under_model_parallel(model: nn.Module) -> Iterator[tuple[str, str]]:
    """FSDP2 and tensor parallel split tensors as they are."""
    for name, module in canonical_modules(model):
        for kind in ("Linear4bit", "Linear8bitLt"):
            if _is_bnb(module, kind):
                yield (
                    name,
                    f"a bitsandbytes {kind} keeps what it needs to read its weight as attributes of the weight, which "
                    "fully_shard and parallelize_module lose; its output would be wrong without an error. "
                    "strategy='fsdp' takes 4-bit layers (with bnb_4bit_quant_storage equal to the dtype), 'ddp' both",
                )
        for p in module.parameters(recurse=False):
            if (foreign := _foreign(p)) and not hasattr(_local(p), "fsdp_pre_all_gather"):
                yield (
                    name,
                    f"its weight is a {foreign}, which does not say how its parts are gathered (fsdp_pre_all_gather; "
                    f"torchao's NF4Tensor does). {_REMEDY}",
                )


def _is_bnb(module: nn.Module, kind: str) -> bool:
    """Adapted layers too, whose class is a subclass."""
    return any(c.__name__ == kind and c.__module__.startswith("bitsandbytes") for c in type(module).__mro__)


def _local(p: Tensor) -> Tensor:
    return p._local_tensor if isinstance(p, DTensor) else p


def _foreign(p: Tensor) -> str | None:
    """The tensor class of a quantising library, if it is one."""
    kind = type(_local(p))
    package = kind.__module__.partition(".")[0]
    return f"{package} {kind.__name__}" if package in ("torchao", "optimum", "quanto", "hqq") else None
