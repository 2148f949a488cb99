"""Lightning's strategy for FSDP2 and tensor parallel, its mesh worked out from the number of devices."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.strategies import ModelParallelStrategy

from lora_lightning.errors import LoraConfigError


class MeshStrategy(ModelParallelStrategy):
    """``ModelParallelStrategy`` that spreads the base over all devices but those that share the work of a layer.

    Lightning's own default makes the processes of a node a tensor-parallel group; here they are one only as far as
    ``tensor_parallel_size`` says.

    Args:
        tensor_parallel_size: So many processes share the work of each layer; ``"auto"``: all those of a node.
        **settings: Of ``ModelParallelStrategy``.
    """

    def __init__(self, tensor_parallel_size: int | Literal["auto"] = 1, **settings: Any) -> None:
        super().__init__(tensor_parallel_size=tensor_parallel_size, **settings)

    def setup_environment(self) -> None:
        """Work out the sizes, then as the base class.

        Raises:
            LoraConfigError: If the devices cannot be divided.
        """
        world, together = self.num_nodes * self.num_processes, self._tensor_parallel_size
        if together == "auto":
            together = self.num_processes
        if together < 1 or world % together:
            raise LoraConfigError(
                f"tensor_parallel_size={together} does not divide the {world} processes of this run "
                f"({self.num_processes} devices on {self.num_nodes} nodes)"
            )
        if self._data_parallel_size == "auto":
            self._data_parallel_size = world // together
        self._tensor_parallel_size = together
        super().setup_environment()
