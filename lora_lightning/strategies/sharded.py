"""What strategies have in common that spread the base over processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.adapters.distributed import write_distributed
from lora_lightning.adapters.files import atomic_folder
from lora_lightning.adapters.written import first_process_writes
from lora_lightning.errors import AdapterError, LoraConfigError
from lora_lightning.injection.state import injected_roots, record_of
from lora_lightning.optim.clip import clip_by_norm, clip_by_value
from lora_lightning.strategies.gathering import whole_together
from lora_lightning.strategies.ranks import of_all_ranks
from lora_lightning.strategies.state import AdapterState


class ShardedState(AdapterState):
    """Adapters beside a base of which every process has a part; the base is neither gathered nor written.

    A checkpoint is a file that the first process writes, or in distributed form a folder to which each writes its part.
    """

    def attach(self, *args: Any) -> None:  # noqa: D102  # as the base class's
        super().attach(*args)
        # Lightning's refuse a norm under FSDP, and plain tensors beside DTensors.
        vars(self.strategy.precision_plugin).update(
            clip_grad_by_norm=functools.partial(self._clip, clip_by_norm),
            clip_grad_by_value=functools.partial(self._clip, clip_by_value),
        )

    def _clip(self, clip: Callable[[Optimizer, float], Any], optimizer: Optimizer, clip_val: float) -> None:
        if not self.module.automatic_optimization:  # called by hand, before the step and what goes before it
            self.synchronise(optimizer)
        clip(optimizer, clip_val)

    def injected(self, target: nn.Module, *, by_callback: bool) -> None:
        """See that what the user has injected began alike on all processes; nothing broadcasts it.

        Raises:
            LoraConfigError: If it did not.
        """
        mine = [record_of(root).seed for root in injected_roots(target).values()]
        seeds = of_all_ranks(mine)
        if any(each != mine for each in seeds):
            raise LoraConfigError(
                f"inject_lora was called with other seeds on other processes ({seeds}), so that their adapters differ: "
                "pass it one seed, or give seed_everything the same on all of them"
            )

    @property
    def distributed(self) -> bool:
        """Whether checkpoints are written in distributed form."""
        return False

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """In distributed form the tensors as they are; else the first process gets them whole, on the CPU."""
        if self.distributed:
            return list(tensors)
        first = self.strategy.is_global_zero  # all processes take part, and the others forget one after the other
        return [value.cpu() if first else None for value in whole_together(tensors)]

    def write(self, checkpoint: dict[str, Any], path: Path, storage_options: Any | None) -> None:
        """A folder from every process, or a file from the first.

        Raises:
            AdapterError: If there are options for how to store a folder.
        """
        if self.distributed:
            if storage_options is not None:
                raise AdapterError(f"storage_options are for a checkpoint that is one file, got {storage_options!r}")
            with atomic_folder(path) as folder:
                write_distributed(checkpoint, folder)
        else:
            save = self.strategy.checkpoint_io.save_checkpoint
            first_process_writes(path, lambda: save(checkpoint, path, storage_options=storage_options))
