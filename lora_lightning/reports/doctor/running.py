"""What is run to see that it runs: two processes that speak with each other, and one that trains to a known result."""

from __future__ import annotations

import json

from lora_lightning.reports.doctor.check import Finding, run_python

LOSS = 2.1116
"""What `train_a_little` ends with in float32. Weights that are off by 1e-5 of themselves change it by 1e-4."""
TOLERANCE = 0.001
_HERE = "lora_lightning.reports.doctor"


def processes() -> Finding:
    """Whether two processes of this machine reach each other, by gloo and where there are two GPUs by NCCL."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return Finding("warning", "this torch has no torch.distributed", "one device works; for several, another torch")
    told = []
    for backend in ["gloo", *["nccl"] * (torch.cuda.device_count() > 1 and dist.is_nccl_available())]:
        store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        commands = [["-m", f"{_HERE}.together", str(rank), str(store.port), backend] for rank in range(2)]
        ran = run_python(commands, seconds=55, OMP_NUM_THREADS="1")
        if ran.codes != [0, 0]:
            why = "they did not meet" if None in ran.codes else ran.last_words
            name = "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME"
            return Finding(
                "warning",
                f"two processes do not reach each other by {backend}: {why}",
                f"several devices will not work; on one machine try {name}=lo, and look at firewall and /etc/hosts",
            )
        told.append(backend)
    return Finding("ok", f"two processes on this machine reach each other ({', '.join(told)})")


def training() -> Finding:
    """A few steps of a tiny model, which end with the same loss on every machine that is in order."""
    ran = run_python([["-m", f"{_HERE}.little_training"]], seconds=220)
    if ran.codes != [0]:
        why = "it did not come to an end" if ran.codes == [None] else ran.last_words
        return Finding(
            "failure", f"a tiny model cannot be trained: {why}", f"see all of it: python -m {_HERE}.little_training"
        )
    told = json.loads(ran.outputs[0].strip().splitlines()[-1])
    text = f"{told['steps']} steps on {told['device']} in {told['seconds']:.1f} s, loss {told['loss']:.4f}"
    if not abs(told["loss"] - LOSS) <= TOLERANCE:
        return Finding(
            "failure",
            f"{text}, which should be {LOSS:.4f} ± {TOLERANCE}",
            "products of matrices are wrong or coarse here: look at versions, drivers and "
            "torch.set_float32_matmul_precision",
        )
    return Finding("ok", f"{text}, as it should be")
