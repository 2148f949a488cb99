"""Peak memory of each process while a base is loaded and spread over two CPU processes.

    python benchmarks/load_memory.py

A Llama of random weights (1 GB of safetensors in several files) is written to a temporary folder, one layer at a time.
Then pairs of processes load it: ``whole`` builds the model in every process and spreads it, ``load_base`` builds it
without memory, spreads it and reads each process's part. Told are the size of a process's part, the highest resident
memory above what the process had before (VmHWM, in which pages of an open file count too), and their ratio.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from lora_lightning import LoraConfig, inject_lora, load_base, meta_parameters
from lora_lightning.strategies.parallelize import shard

WAYS = ("whole", "load_base")
MESHES = {"fsdp2": (2, 1), "tp": (1, 2)}


def config() -> LlamaConfig:
    """A model of 260 million parameters in float32."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=13,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=True,
    )


def write_base(folder: Path) -> int:
    """Write the model's files, never more than one layer in memory; returns their bytes."""
    config().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config()).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    for file, names in files.items():
        tensors = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in names.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def memory(key: str) -> float:
    """A line of this process's status, in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) / 1000


def load(way: str, kind: str, folder: Path, rank: int, meeting: str) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", MESHES[kind], mesh_dim_names=("data_parallel", "tensor_parallel"))
    before = memory("VmRSS")
    if way == "whole":
        model = LlamaForCausalLM.from_pretrained(folder)
        inject_lora(model, LoraConfig(r=16))
        shard(model, mesh)
    else:
        with meta_parameters():
            model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
        inject_lora(model, LoraConfig(r=16))
        shard(model, mesh)
        load_base(model, folder)
    locals_ = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    part = sum(p.numel() * p.element_size() for p in locals_) / 1e6
    print(json.dumps({"part_mb": part, "before_mb": before, "peak_mb": memory("VmHWM")}))
    dist.destroy_process_group()


def main() -> None:
    """Write the base, run every way, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    child = parser.parse_args().child
    if child:
        load(child[0], child[1], Path(child[2]), int(child[3]), child[4])
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "base"
        folder.mkdir()
        print(f"files: {write_base(folder) / 1e6:.0f} MB")
        print(f"{'way':<12}{'mesh':<8}{'rank':<6}{'part (MB)':>10}{'peak above start (MB)':>24}{'ratio':>8}")
        for kind in MESHES:
            for way in WAYS:
                meeting = Path(temporary) / f"{way}-{kind}"
                command = [sys.executable, __file__, "--child", way, kind, str(folder)]
                pair = [
                    subprocess.Popen([*command, str(rank), str(meeting)], stdout=subprocess.PIPE, text=True)
                    for rank in range(2)
                ]
                for rank, process in enumerate(pair):
                    figures = json.loads(process.communicate()[0].splitlines()[-1])
                    above = figures["peak_mb"] - figures["before_mb"]
                    ratio = above / figures["part_mb"]
                    print(f"{way:<12}{kind:<8}{rank:<6}{figures['part_mb']:>10.0f}{above:>24.0f}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
