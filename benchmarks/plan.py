"""What a plan says of memory, and what training takes: ``python benchmarks/plan.py [--write]``.

Each model is trained for some steps in a process of its own, in float32 on the CPU, by Lightning's Trainer with a
`LoraCallback`. Its peak of resident memory, less what the process had before the model was loaded, stands beside the
plan's number. ``--write`` puts the table into docs/plan.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plan.md"
STEPS = 2


class Case(NamedTuple):
    """A training to be planned and run.

    Attributes:
        model: Its name; or that of a shape of `RANDOM`, whose weights are drawn.
        task: As a plan calls it.
        rows: Of a batch.
        tokens: Of a row; all of them have a label.
        padded: Whether the last row is shorter by one token.
        checkpointing: Activations are computed again.
        rank: Of the adapter, on all linear layers.
        start: Its ``init_lora_weights``.
    """

    model: str
    task: str
    rows: int
    tokens: int
    padded: bool = False
    checkpointing: bool = False
    rank: int = 16
    start: bool | str = True

    @property
    def settings(self) -> dict[str, Any]:
        """Of the plan."""
        return {"task": self.task, "rows": self.rows, "tokens": self.tokens, "padded": self.padded, "num_labels": 5}


SMOLLM2 = "demo:smollm2-135m-instruct"
CASES = {
    "SmolLM2-135M": Case(SMOLLM2, "causal_lm", 4, 256),
    "SmolLM2-135M, padded": Case(SMOLLM2, "causal_lm", 4, 256, padded=True),
    "SmolLM2-135M, checkpointing": Case(SMOLLM2, "causal_lm", 4, 512, checkpointing=True),
    "SmolLM2-135M, checkpointing, twice the rows": Case(SMOLLM2, "causal_lm", 8, 512, checkpointing=True),
    "SmolLM2-135M, OLoRA": Case(SMOLLM2, "causal_lm", 4, 256, start="olora"),
    "MiniLM-L6, classifier": Case("demo:minilm-l6", "sequence_classification", 32, 128),
    "random Llama, 63M": Case("llama", "causal_lm", 8, 256, rank=64),
    "random Llama, 63M, PiSSA": Case("llama", "causal_lm", 8, 256, rank=64, start="pissa_niter_4"),
    "random Llama, 63M, checkpointing": Case("llama", "causal_lm", 8, 256, rank=64, checkpointing=True),
    "random GPT-2, 57M": Case("gpt2", "causal_lm", 8, 256),
}
RANDOM = {
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 640,
        "intermediate_size": 1728,
        "num_hidden_layers": 10,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "vocab_size": 16000,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 640,
        "n_layer": 10,
        "n_head": 10,
        "vocab_size": 12000,
        "n_positions": 512,
    },
}
"""Their ``config.json``."""


def main() -> None:
    """Measure what the command line names, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--only", choices=list(CASES), help="one case")
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(_measure(CASES[chosen.child], chosen.folder)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, shape in RANDOM.items():
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(shape))
        rows = [_row(name, folder) for name in CASES if chosen.only in (None, name)]
    table = _table(rows)
    print(table)
    if chosen.write:
        _write("measured", table)


def _row(name: str, folder: Path) -> list[str]:
    from lora_lightning.reports.plan.table import size

    case = CASES[name]
    started = time.perf_counter()
    planned = _plan(case, folder)
    took = time.perf_counter() - started
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise SystemExit(done.stderr)
    peak = json.loads(done.stdout.splitlines()[-1])["peak"]
    estimate = planned.memory.total
    batch = f"{case.rows} × {case.tokens}"
    print(f"{name}: plan {size(estimate)}, peak {size(peak)}", file=sys.stderr, flush=True)
    return [name, str(case.rank), batch, size(estimate), size(peak), f"{estimate / peak - 1:+.1%}", f"{took:.1f} s"]


def _plan(case: Case, folder: Path) -> Any:
    from lora_lightning.reports.plan import plan

    model = {"name": _name(case, folder), "gradient_checkpointing": case.checkpointing}
    return plan(model, _lora(case), calibration=False, **case.settings)


def _name(case: Case, folder: Path) -> str:
    return str(folder / case.model) if case.model in RANDOM else case.model


def _lora(case: Case) -> Any:
    from lora_lightning import LoraConfig

    rank = case.rank
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05, init_lora_weights=case.start)


def _measure(case: Case, folder: Path) -> dict[str, int]:
    """Bytes that training takes at most, in this process."""
    import torch
    from lightning.pytorch import Trainer, seed_everything

    from lora_lightning import LoraCallback

    seed_everything(0, verbose=False)
    batch = _batch(case)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=1,
        enable_model_summary=False,
        default_root_dir=folder,
        gradient_clip_val=1.0,
        callbacks=[LoraCallback(_lora(case))],
        **silent,
    )
    loader = torch.utils.data.DataLoader([batch] * STEPS, batch_size=None)
    _task(Case("demo:tiny-llama", "causal_lm", 1, 8), folder)  # what only the first model imports
    before = _memory("VmRSS")
    task = _task(case, folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: loading may read a file besides
    trainer.fit(task, loader)
    return {"before": before, "peak": _memory("VmHWM") - before}


def _task(case: Case, folder: Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lora_lightning.strategies.checkpointing import checkpoint_activations
    from lora_lightning.tasks import CausalLM, SequenceClassification

    class Random(CausalLM):
        """Over weights that are drawn."""

        def _load(self, config: Any) -> Any:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=torch.float32)
            if case.checkpointing:
                checkpoint_activations(model)
            return None, model.train()

    name = _name(case, folder)
    model = {"name": name, "gradient_checkpointing": case.checkpointing, "dtype": "float32"}
    if case.task == "sequence_classification":
        return SequenceClassification(model, num_labels=5)
    return (Random if case.model in RANDOM else CausalLM)(model)


def _batch(case: Case) -> dict[str, Any]:
    import torch

    ids = torch.randint(1000, (case.rows, case.tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if case.padded:
        mask[-1, -1] = 0
    labels = ids if case.task == "causal_lm" else ids[:, 0] % 5
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"{name}:\s+(\d+) kB", status)[0])


def _table(rows: list[list[str]]) -> str:
    head = ["model", "r", "rows × tokens", "plan", "peak", "plan to peak", "planned in"]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _write(name: str, table: str) -> None:
    page = PAGE.read_text()
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if begin not in page or end not in page:
        raise SystemExit(f"{PAGE} has no place for the table: {begin} … {end}")
    PAGE.write_text(page[: page.index(begin) + len(begin)] + "\n" + table + "\n" + page[page.index(end) :])


if __name__ == "__main__":
    main()
