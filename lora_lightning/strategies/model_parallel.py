"""FSDP2 and tensor parallel (``ModelParallelStrategy``), where the LightningModule shards itself."""

from __future__ import annotations

from typing import cast

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.optim import Optimizer

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection.state import lora_layers
from lora_lightning.layers import LoraLayer
from lora_lightning.layers.linear import LoraOverLinear
from lora_lightning.optim.by_kind import step_by_kind
from lora_lightning.strategies.checks import check_replicated
from lora_lightning.strategies.parallelize import DATA, TENSOR
from lora_lightning.strategies.quantised import check_quantised
from lora_lightning.strategies.replicated import average_gradients, settle
from lora_lightning.strategies.sharded import ShardedState


class ModelParallelState(ShardedState):
    """Adapters beside ``DTensor`` weights.

    Those that are injected before ``fully_shard`` and ``parallelize_module`` become ``DTensor`` with the rest. Those
    that the callback injects afterwards are whole on every process of the data-parallel mesh, and their gradients are
    averaged here; over the tensor-parallel mesh they are laid out as their layer is.
    """

    @property
    def distributed(self) -> bool:
        """As ``ModelParallelStrategy(save_distributed_checkpoint=…)`` says."""
        return cast("ModelParallelStrategy", self.strategy)._save_distributed_checkpoint

    def injected(self, target: nn.Module, *, by_callback: bool) -> None:
        """Lay adapters out over the tensor-parallel mesh where their layer is.

        Raises:
            LoraConfigError: If the user has split them so that a process has nothing of one.
        """
        super().injected(target, by_callback=by_callback)
        check_quantised("ModelParallelStrategy", target)
        check_replicated("ModelParallelStrategy", target)
        for name, layer in lora_layers(target):
            _follow(layer)
            _check_parts(name, layer)

    def synchronise(self, optimizer: Optimizer) -> None:
        """Average over the data-parallel mesh what FSDP2 does not, and let plain and ``DTensor`` parameters step."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        settle(parameters)
        mesh = cast("ModelParallelStrategy", self.strategy).device_mesh[DATA]
        if mesh.size() > 1 and (alone := [p for p in parameters if not _over_data(p)]):
            average_gradients(alone, mesh.get_group())
        step_by_kind(optimizer)


def _over_data(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) and DATA in (parameter.device_mesh.mesh_dim_names or ())


def _follow(layer: LoraLayer) -> None:
    """Megatron's layout: a weight split by outputs has ``lora_B`` (and DoRA's ``m``) split, by inputs ``lora_A``."""
    weight = layer.weight
    names = weight.device_mesh.mesh_dim_names or () if isinstance(weight, DTensor) else ()
    if TENSOR not in names or isinstance(layer.lora_A, DTensor):
        return
    mesh = weight.device_mesh[TENSOR] if weight.device_mesh.ndim > 1 else weight.device_mesh
    along = weight.placements[names.index(TENSOR)]
    linear = isinstance(layer, LoraOverLinear)
    whole = Replicate()
    for name in layer.lora_parameter_names:
        split = Shard(1) if name == "lora_A" else Shard(0)  # the others begin with the outputs
        _lay_out(layer, name, mesh, split if linear and along == split else whole)


def _check_parts(name: str, layer: LoraLayer) -> None:
    """FSDP2 cannot reduce the gradient of a tensor of which tensor parallel has left a process nothing."""
    for part in ("lora_A", "lora_B"):
        p = getattr(layer, part)
        if not isinstance(p, DTensor) or not {DATA, TENSOR} <= set(p.device_mesh.mesh_dim_names or ()):
            continue
        along = (p.device_mesh.mesh_dim_names or ()).index(TENSOR)
        placement, ways = p.placements[along], p.device_mesh.size(along)
        if isinstance(placement, Shard) and p.shape[placement.dim] < ways:
            raise LoraConfigError(
                f"{name}.{part} is {tuple(p.shape)}, and {ways} tensor-parallel processes cannot each have a part of "
                f"its {p.shape[placement.dim]}: use a rank of at least {ways}, or leave injection to the callback, "
                "which does not split it so"
            )


def _lay_out(layer: LoraLayer, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    parameter: nn.Parameter = getattr(layer, name)
    like = DTensor.from_local(parameter.detach(), mesh, [Replicate()], run_check=False)
    if isinstance(placement, Shard):
        like = like.redistribute(placements=[placement])
    setattr(layer, name, nn.Parameter(like, requires_grad=parameter.requires_grad))
