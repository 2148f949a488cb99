"""One training of a small transformer under one strategy, on CPU processes: what the tests and tables are made from.

    python benchmarks/strategy_run.py --strategy fsdp2 --out out/fsdp2 --stop 6
    python benchmarks/strategy_run.py --strategy ddp --out out/ddp --stop 6 --ckpt out/fsdp2/step=3.ckpt

Every rank takes its share of the same batches, so that all strategies compute the same thing. It leaves in ``--out``
the checkpoint of every step that ``--save`` names, the whole adapter after the last one (``final.pt``), the adapter
folder, and ``figures.json`` from each rank.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoraCallback, LoraConfig, inject_lora
from lora_lightning.strategies import state_for

CONFIG = LoraConfig(r=4, lora_alpha=8)
VOCABULARY, ROWS, LENGTH = 64, 64, 12


class Block(nn.Module):
    """A transformer block with the field's names for its layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width) -> (B, T, width)``."""
        h = self.norm(x)
        q, k, v = (
            layer(h).view(*h.shape[:2], -1, h.shape[-1] // self.heads).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )  # each (B, heads, T, width / heads), of the heads that are here
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(a.transpose(1, 2).flatten(2))
        return x + self.down_proj(torch.tanh(self.up_proj(self.norm(x))))


class Network(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(blocks))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, T) -> (B, T, vocabulary)``."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Module(pl.LightningModule):
    """Next-token prediction on this rank's share of each batch."""

    config = CONFIG

    def __init__(self, width: int, blocks: int, early: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = Network(width, blocks)
        self.early = early

    def share(self) -> tuple[int, int]:
        """This process's number among those with different data, and how many they are."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.trainer.strategy.device_mesh["data_parallel"]
            return mesh.get_local_rank(), mesh.size()
        return self.global_rank, self.trainer.world_size

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The mean loss of this rank's rows."""
        rank, ranks = self.share()
        tokens = batch[0][rank::ranks]
        logits = self.net(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.log("loss", loss)
        return loss

    def by_hand(self, batch: list[Tensor], batch_idx: int) -> None:
        """A training step with manual optimization, clipping included."""
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(type(self).training_step(self, batch, batch_idx))
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")
        self.clip_gradients(optimizer, gradient_clip_val=0.001, gradient_clip_algorithm="value")
        optimizer.step()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The mean loss of all rows, on every rank."""
        logits = self.net(batch[0][:, :-1])
        self.log("val_loss", nn.functional.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten()))

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Logits, ``(B, T, vocabulary)``."""
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; its eps keeps rounding in near-zero gradients from being blown up."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-5)


class Sharded(Module):
    """Shards itself over the mesh that there is."""

    partial_plan = False

    def configure_model(self) -> None:
        """Tensor parallel inside a block, FSDP2 around it; once."""
        if getattr(self, "_sharded", False):
            return
        self._sharded = True
        if self.early:
            inject_lora(self, self.config)
        data, tensor = self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]
        blocks = self.net.blocks[:1] if self.partial_plan else self.net.blocks
        for block in blocks if tensor.size() > 1 else ():
            plan: dict[str, Any] = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj", "up_proj")}
            plan |= {name: RowwiseParallel() for name in ("o_proj", "down_proj")}
            parallelize_module(block, tensor, plan)
        if data.size() > 1:
            for block in self.net.blocks:
                fully_shard(block, mesh=data)
            fully_shard(self.net, mesh=data)


class PartialPlan(Sharded):
    """A tensor-parallel plan that covers only the first block."""

    partial_plan = True


class CpuFsdp(FSDPStrategy):
    """Lightning's FSDP asks for CUDA; for tests it runs on the CPU as well."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return model  # as the original
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=torch.device("cpu"), **self.kwargs
        )


class CpuDeepSpeed(DeepSpeedStrategy):
    """Lightning's DeepSpeed asks for CUDA; DeepSpeed itself has a CPU accelerator (``DS_ACCELERATOR=cpu``)."""

    @property
    def root_device(self) -> torch.device:  # noqa: D102  # as the original's
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:  # noqa: D102  # without the question after CUDA
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:  # noqa: D102  # without setting the CUDA device
        self.set_world_ranks()
        self._init_deepspeed_distributed()


STRATEGIES = ("single", "ddp", "ddp_fork", "fsdp", "fsdp2", "tp", "tp_partial", "fsdp2_tp")
STRATEGIES += ("deepspeed_1", "deepspeed_2", "deepspeed_3")


def strategy_of(name: str, *, sharded: bool, cpu: bool = True) -> tuple[Any, int]:
    """A strategy, or Lightning's name of one, and its number of processes."""
    if name == "fsdp":
        policy = ModuleWrapPolicy({Block})
        kind = CpuFsdp if cpu else FSDPStrategy
        return kind(auto_wrap_policy=policy, state_dict_type="sharded" if sharded else "full"), 2
    if name.startswith("deepspeed"):
        if cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported, by the strategy
        return (CpuDeepSpeed if cpu else DeepSpeedStrategy)(stage=int(name[-1])), 2
    sizes = {"fsdp2": (2, 1), "tp": (1, 2), "tp_partial": (1, 2), "fsdp2_tp": (2, 2)}.get(name)
    if sizes:
        data, tensor = sizes
        return ModelParallelStrategy(data, tensor, save_distributed_checkpoint=sharded), data * tensor
    return {"single": "auto"}.get(name, name), 1 if name == "single" else 2


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=STRATEGIES, required=True)
    parser.add_argument("--early", action="store_true", help="inject in configure_model, before sharding")
    parser.add_argument("--sharded", action="store_true", help="checkpoints in distributed form")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--stop", type=int, default=6, help="the last step")
    parser.add_argument("--save", type=int, default=3, help="save every so many steps")
    parser.add_argument("--ckpt", default=None)
    parser.add_argument("--stages", default="fit", help="of fit,validate,test,predict, in order")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--by-hand", action="store_true", help="manual optimization")
    parser.add_argument("--clip", type=float, default=0.05)
    args = parser.parse_args()

    torch.set_num_threads(1)
    started = time.perf_counter()
    # Ranks need not agree where the callback injects.
    pl.seed_everything(3 + (0 if args.early else int(os.environ.get("LOCAL_RANK", 0))), verbose=False)
    sharding = args.strategy in ("fsdp2", "tp", "tp_partial", "fsdp2_tp")
    kind = PartialPlan if args.strategy == "tp_partial" else Sharded if sharding else Module
    module = kind(args.width, args.blocks, args.early)
    if args.strategy == "ddp_fork" or (args.early and not sharding):
        inject_lora(module, CONFIG)
    if args.by_hand:
        module.automatic_optimization = False
        module.training_step = module.by_hand  # type: ignore[method-assign]
    strategy, devices = strategy_of(args.strategy, sharded=args.sharded, cpu=args.accelerator == "cpu")
    generator = torch.Generator().manual_seed(11)
    rows = TensorDataset(torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator))
    saver = ModelCheckpoint(args.out, filename="{step}", save_top_k=-1, every_n_train_steps=args.save)
    trainer = pl.Trainer(
        max_steps=args.stop,
        accelerator=args.accelerator,
        devices=devices,
        strategy=strategy,
        gradient_clip_val=None if args.by_hand else args.clip,
        use_distributed_sampler=False,
        default_root_dir=args.out,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=2,
        callbacks=[saver, LoraCallback(CONFIG)],
    )
    loader = DataLoader(rows, batch_size=8)
    results: dict[str, Any] = {}
    for stage in args.stages.split(","):
        ckpt = args.ckpt
        if stage == "fit":
            trainer.fit(module, loader, ckpt_path=ckpt)
        elif stage == "predict":
            logits = trainer.predict(module, loader, ckpt_path=ckpt)
            results["logits"] = float(torch.cat(logits).double().abs().sum()) if logits else None
        else:
            results[stage] = getattr(trainer, stage)(module, loader, ckpt_path=ckpt, verbose=False)
    state = state_for(trainer.strategy).whole_state() if args.strategy != "ddp_fork" else None
    if state is None:  # the trained processes are gone; what came back is in this one's module
        from lora_lightning import lora_state_dict

        state = lora_state_dict(module)
    rank = trainer.global_rank
    torch.save({name: value.detach() for name, value in state.items()}, args.out / f"final-{rank}.pt")
    results["seconds"] = time.perf_counter() - started
    (args.out / f"figures-{rank}.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        # Threads of torch's process groups now and then abort a process on its way through the interpreter's end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
