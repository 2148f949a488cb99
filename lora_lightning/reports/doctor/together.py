"""One of two processes that find each other: ``python -m lora_lightning.reports.doctor.together rank port backend``."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def main(rank: int, port: int, backend: str) -> None:
    """Tell the other a number, and add up what both have."""
    limit = timedelta(seconds=40)
    store = dist.TCPStore("127.0.0.1", port, None, is_master=False, timeout=limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=limit)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    told = torch.full((1,), 7.0 if rank == 0 else 0.0, device=device)
    dist.broadcast(told, src=0)
    summed = torch.full((1,), float(rank + 1), device=device)
    dist.all_reduce(summed)
    if (told.item(), summed.item()) != (7.0, 3.0):
        raise SystemExit(f"wrong numbers came: {told.item()}, {summed.item()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
