"""Sharding for ``configure_model``: FSDP2 and tensor parallel by one call, for networks of repeated blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.names import canonical_modules, find_root
from lora_lightning.layers.parameters import LoraParameter
from lora_lightning.layers.tokens import TokenRows
from lora_lightning.strategies.blocks import blocks
from lora_lightning.strategies.checkpointing import checkpoint_activations, refuse_reentrant
from lora_lightning.strategies.checks import check_replicated
from lora_lightning.strategies.equal import differing
from lora_lightning.strategies.quantised import check_quantised

DATA, TENSOR = "data_parallel", "tensor_parallel"  # the names of Lightning's mesh

# transformers' names of styles, older and newer. None: the module stays whole on every process.
_STYLES: dict[str, tuple[type[ParallelStyle], dict[str, Any]] | None] = {
    "colwise": (ColwiseParallel, {}),
    "colwise_rep": (ColwiseParallel, {"output_layouts": Replicate()}),
    "colwise_gather_output": (ColwiseParallel, {"output_layouts": Replicate()}),
    "rowwise": (RowwiseParallel, {}),
    "rowwise_rep": (RowwiseParallel, {"input_layouts": Replicate()}),
    "rowwise_split_input": (RowwiseParallel, {"input_layouts": Replicate()}),
    "embedding_rowwise": (RowwiseParallel, {"input_layouts": Replicate()}),
    "replicate": None,
    "replicated_with_grad_allreduce": None,  # the base is frozen: there is no gradient to reduce
}
_BY_NAME = {name: "colwise" for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")} | {
    name: "rowwise" for name in ("o_proj", "down_proj")
}
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "num_kv_heads", "n_kv_heads")


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    precision: str = "32-true",
    plan: Mapping[str, str | ParallelStyle] | None = None,
    activation_checkpointing: bool = False,
    reshard_after_forward: bool = True,
) -> nn.Module:
    """Spread a network over processes: tensor parallel, then FSDP2 over each repeated block and the rest.

    Call it in ``configure_model``, after the network is built (and ``inject_lora``, if the adapters are to be sharded
    too), before :func:`load_base` where it was built without memory::

        def configure_model(self):
            if self.device_mesh is not None:
                shard(self.model, self.device_mesh, precision=self.trainer.precision)

    Args:
        model: The network whose ``forward`` the training calls; not the LightningModule.
        mesh: With the dimensions ``data_parallel`` and ``tensor_parallel`` (either may be missing), as Lightning makes.
        precision: The trainer's. With ``bf16-mixed``, FSDP2 gathers weights in bfloat16 and reduces in float32; a
            ``-true`` precision has converted the weights themselves.
        plan: How layers are split over the tensor-parallel mesh, see :func:`tensor_parallel_plan`; None is the
            network's own.
        activation_checkpointing: Recompute each block's activations in backward.
        reshard_after_forward: Whether a block's weights are given up after its forward and gathered again in backward.

    Returns:
        The network, changed in place.

    Raises:
        LoraConfigError: If it cannot be spread: quantised layers, heads that cannot be divided, no plan, weights that
            are not the same on all processes.
    """
    if isinstance(model, pl.LightningModule):
        raise LoraConfigError(
            f"shard() takes the network, not the {type(model).__name__} around it, whose training_step would not pass "
            "the hooks that gather its weights: shard(self.model, self.device_mesh)"
        )
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
    if not sizes.keys() & {DATA, TENSOR}:
        raise LoraConfigError(f"the mesh needs a dimension {DATA!r} or {TENSOR!r}, got {mesh.mesh_dim_names}")
    check_quantised("ModelParallelStrategy", model)
    check_replicated("ModelParallelStrategy", model)
    refuse_reentrant(model)
    _check_equal(model)
    if sizes.get(TENSOR, 1) > 1:
        tensor_parallel(model, mesh[TENSOR], plan)
    if activation_checkpointing:
        checkpoint_activations(model)
    if DATA in sizes and (sizes[DATA] > 1 or sizes.get(TENSOR, 1) == 1):
        settings: dict[str, Any] = {"mesh": mesh[DATA], "mp_policy": mixed_precision(precision)}
        for block in blocks(model):
            fully_shard(block, reshard_after_forward=reshard_after_forward, **settings)
        fully_shard(model, **settings)
    return model


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """FSDP2's policy for a Trainer's ``precision``."""
    if str(precision) == "bf16-mixed":
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if str(precision).endswith("-mixed"):
        raise LoraConfigError(f"precision={precision!r} is not supported under FSDP2: use bf16-mixed, or a -true one")
    return MixedPrecisionPolicy()


def tensor_parallel(model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str | ParallelStyle] | None = None) -> None:
    """Split layers over a tensor-parallel mesh, in place, without communication.

    Raises:
        LoraConfigError: As for :func:`tensor_parallel_plan`, or if a number of heads is not divisible.
    """
    by_module = tensor_parallel_plan(model, plan)
    _divide_heads(model, by_module, mesh.size())
    modules = dict(canonical_modules(model))
    owners = _tied(model)
    for name, style in by_module.items():
        parallelize_module(modules[name], mesh, style, src_data_rank=None)
    for first, *others in owners:  # split alike, or the plan would have left them whole
        for other in others:
            other.weight = first.weight


def tensor_parallel_plan(
    model: nn.Module, plan: Mapping[str, str | ParallelStyle] | None = None
) -> dict[str, ParallelStyle]:
    """Which layer is split how, by canonical name.

    Args:
        model: A network.
        plan: Patterns of names, ``*`` standing for one part of a name, to styles: ``"colwise"`` (split by outputs),
            ``"rowwise"`` (by inputs) and what else transformers' plans say, or torch's own objects. None takes what a
            transformers model brings along, else splits layers named ``q_proj``, ``k_proj``, ``v_proj``,
            ``gate_proj`` and ``up_proj`` by outputs, ``o_proj`` and ``down_proj`` by inputs.

    Raises:
        LoraConfigError: If there is no plan, a style that is not known here, or an adapter that cannot be split.
    """
    prefix, root = find_root(model)
    given: Mapping[str, Any] = plan or getattr(root, "_tp_plan", None) or _plan_of_config(root)
    names = [name for name, module in canonical_modules(model) if isinstance(module, (nn.Linear, nn.Embedding))]
    if not given:
        given = {name: _BY_NAME[last] for name in names if (last := name.rpartition(".")[2]) in _BY_NAME}
        prefix = ""
    modules = dict(canonical_modules(model))
    found: dict[str, ParallelStyle] = {}
    for pattern, style in given.items():
        whole = f"{prefix}.{pattern}" if prefix and plan is None else pattern
        shape = re.compile(re.escape(whole).replace(r"\*", r"[^.]+"))
        for name in (name for name in modules if shape.fullmatch(name)):
            if (made := _style(style, name)) is not None:
                found[name] = made
    for owners in _tied(model):
        names_of = [name for name in found if any(modules[name] is owner for owner in owners)]
        if len(names_of) < len(owners) or len({_split_by_rows(modules[n], found[n]) for n in names_of}) > 1:
            for name in names_of:
                del found[name]  # split otherwise than what it is tied to, it would be another weight from then on
    if not found:
        raise LoraConfigError(
            f"no tensor-parallel plan for {type(root).__name__}: it brings none along and has no layers called "
            f"{', '.join(_BY_NAME)}. Give plan={{'layers.*.attention.query': 'colwise', …}}; its layers are "
            f"{', '.join(names[:8])}"
        )
    _refuse_held({name: modules[name] for name in found})
    return found


def _refuse_held(modules: Mapping[str, nn.Module]) -> None:
    """A layer is split with all that is in it, and what an adapter has put there is not the layer's to split."""
    for name, module in modules.items():
        for part in module.children():
            if isinstance(part, LoraParameter):
                raise LoraConfigError(
                    f"{name} has an adapter of its own parameters (target_parameters), which does not follow where a "
                    "layer is split over processes: name the layer in target_modules, or use DDP or FSDP2"
                )
            if isinstance(part, TokenRows):
                raise LoraConfigError(
                    f"tokens of {name} train (trainable_token_indices), and it is to be split over processes: inject "
                    "after shard(), as LoraCallback does where configure_model calls it"
                )


def _tied(model: nn.Module) -> list[list[nn.Module]]:
    """Modules that share one weight."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter):
            owners.setdefault(id(weight), []).append(module)
    return [several for several in owners.values() if len(several) > 1]


def _split_by_rows(module: nn.Module, style: ParallelStyle) -> bool:
    return isinstance(style, RowwiseParallel) == isinstance(module, nn.Embedding)


def _plan_of_config(root: nn.Module) -> dict[str, str]:
    """The plan of the backbone, with the backbone's name before it."""
    plan = getattr(getattr(root, "config", None), "base_model_tp_plan", None) or {}
    backbone = getattr(root, "base_model_prefix", "")
    return {f"{backbone}.{key}" if hasattr(root, backbone or " ") else key: style for key, style in plan.items()}


def _style(style: str | ParallelStyle, name: str) -> ParallelStyle | None:
    if isinstance(style, ParallelStyle):
        return style
    if style not in _STYLES:
        raise LoraConfigError(
            f"{name} is to be split as {style!r}, which adapters do not follow here (known: {', '.join(_STYLES)}): use "
            "FSDP2 (tensor_parallel_size=1), or give a plan= without it"
        )
    known = _STYLES[style]
    return None if known is None else known[0](**known[1])


def _divide_heads(model: nn.Module, plan: Mapping[str, ParallelStyle], size: int) -> None:
    """Each process has its share of the heads: a transformers model works that out from shapes, others count them."""
    config = getattr(find_root(model)[1], "config", None)
    modules = dict(canonical_modules(model))
    attentions = [] if config is not None else [modules[name] for name in {n.rpartition(".")[0] for n in plan}]
    counts = [(module, name) for module in attentions for name in _HEADS if isinstance(vars(module).get(name), int)]
    numbers = [(name, getattr(config, name, None)) for name in _HEADS]
    numbers += [(name, vars(module)[name]) for module, name in counts]
    if odd := [f"{name}={n}" for name, n in numbers if isinstance(n, int) and n % size]:
        raise LoraConfigError(f"{', '.join(odd)} cannot be divided by {size}, the size of the tensor-parallel mesh")
    for module, name in counts:
        vars(module)[name] //= size


def _check_equal(model: nn.Module) -> None:
    """Nothing is sent around when weights are split: every process has to start from the same."""
    real = {n: p for n, p in model.named_parameters() if not p.is_meta and not isinstance(p, DTensor)}
    if found := differing(real):
        raise LoraConfigError(
            f"{next(iter(found))} and {len(found) - 1} more tensors are not the same on all processes, and each would "
            "keep its part of another model: load the weights from files, or call seed_everything before building"
        )
