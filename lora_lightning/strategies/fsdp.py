"""FSDP: the frozen base is flattened and sharded, the adapters stay whole on every process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from lora_lightning.errors import LoraConfigError
from lora_lightning.injection import lora_parameters
from lora_lightning.injection.names import unwrap
from lora_lightning.strategies.checks import check_replicated
from lora_lightning.strategies.equal import differing
from lora_lightning.strategies.quantised import check_quantised
from lora_lightning.strategies.replicated import average_gradients, broadcast
from lora_lightning.strategies.sharded import ShardedState


class FsdpState(ShardedState):
    """Adapters that FSDP ignores, their gradients averaged here.

    In a flat parameter, what trains would bring memory for the gradient of the whole unit, the frozen base's too.
    """

    _root: nn.Module | None = None
    _ignored: Sequence[nn.Parameter] = ()

    def attach(self, *args: Any) -> None:  # noqa: D102  # as the base class's
        super().attach(*args)
        if "_setup_model" not in vars(self.strategy):
            self._wrap = cast("FSDPStrategy", self.strategy)._setup_model
            vars(self.strategy)["_setup_model"] = self._setup_model

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Wrap a module once: Lightning would leave out the outermost wrapper when ``validate`` follows ``fit``."""
        if self._root is None or unwrap(self._root) is not model:
            self._root = self._wrap(model)
        return self._root

    @property
    def distributed(self) -> bool:
        """As ``FSDPStrategy(state_dict_type="sharded")`` says."""
        return cast("FSDPStrategy", self.strategy)._state_dict_type == "sharded"

    def injected(self, target: nn.Module, *, by_callback: bool) -> None:
        """Keep what trains out of the flat parameters, and bring it to the device.

        Raises:
            LoraConfigError: If the user has wrapped the model with the adapters in it.
        """
        super().injected(target, by_callback=by_callback)
        check_quantised("FSDPStrategy", target)
        check_replicated("FSDPStrategy", target)
        strategy = cast("FSDPStrategy", self.strategy)
        adapters = lora_parameters(target)
        flat = {
            id(p)
            for module in self.module.modules()
            if isinstance(module, FullyShardedDataParallel) and module._handle is not None
            for p in module._handle.flat_param._params or ()
        }
        if inside := [name for name, p in adapters.items() if id(p) in flat]:
            raise LoraConfigError(
                f"{inside[0]} and {len(inside) - 1} other adapter tensors are in FSDP's flat parameters, whose "
                "gradients take the memory of the whole base: wrap with "
                "FullyShardedDataParallel(…, ignored_states=list(lora_parameters(model).values())), or leave the "
                "wrapping to the strategy (auto_wrap_policy)"
            )
        trained = [p for p in self.module.parameters() if p.requires_grad]  # outside the adapted network too
        ours = {id(p) for p in (*self._ignored, *trained)}
        users = (*strategy.kwargs.pop("ignored_modules", ()), *strategy.kwargs.get("ignored_states", ()))
        parameters = [p for each in users for p in (each.parameters() if isinstance(each, nn.Module) else (each,))]
        strategy.kwargs["ignored_states"] = [*(p for p in parameters if id(p) not in ours), *trained]
        self._ignored = trained
        for parameter in trained:
            parameter.data = parameter.data.to(strategy.root_device)
        # FSDP sends nothing around: a head that each process has drawn for itself begins as the first one's.
        broadcast([p for p in trained if not p.is_meta], cast("dist.ProcessGroup", dist.group.WORLD))
        self._check_base()

    def _check_base(self) -> None:
        base = {n: p for n, p in self.module.named_parameters() if not p.requires_grad and type(p) is nn.Parameter}
        if any(isinstance(module, FullyShardedDataParallel) for module in self.module.modules()):
            return  # everyone has its own part already
        if cast("FSDPStrategy", self.strategy).kwargs.get("sync_module_states"):
            return
        if found := differing({name: p for name, p in base.items() if not p.is_meta}):
            raise LoraConfigError(
                f"{next(iter(found))} and {len(found) - 1} more tensors of the base are not the same on all processes, "
                "and FSDP would put it together from parts of several models: load the weights from files, call "
                "seed_everything before building, or give the strategy sync_module_states=True"
            )

    def synchronise(self, optimizer: Optimizer) -> None:
        """Average over all processes."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        average_gradients(parameters, cast("dist.ProcessGroup", dist.group.WORLD))
