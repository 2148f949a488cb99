"""Folders of runs as they are left behind, made without training; what they say is as hostile as text can be."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=alert(1)>\"'&\u202egnp.\x1b[2J"
CONFIG = """\
name: headlines
seed: 3
lora: {r: 16, lora_alpha: 32, target_modules: [q_proj, v_proj], lora_dropout: 0.05, use_rslora: true, bias: none}
model: {name: demo:tiny-llama, dtype: auto, revision: null}
data: {_target_: lora_lightning.data.TinyText, batch_size: 8, max_length: 512, packing: false}
optimizer: {_target_: torch.optim.AdamW, lr: 0.001, weight_decay: 0.0}
scheduler: {_target_: lora_lightning.tasks.schedule.warmup_cosine}
trainer: {max_steps: 40, max_epochs: -1, precision: 32-true, devices: 1}
"""


def write_run(folder: Path, *, steps: int = 40, text: str = HOSTILE, finished: bool = True) -> Path:
    """A run with all that a page shows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG + f"note: {json.dumps(text)}\n", encoding="utf-8")
    rows = ["epoch,lr-AdamW,step,train_loss,val_loss,val_accuracy,insight/rank_used_mean"]
    for step in range(steps):
        rows.append(f",{1e-3 * (1 - step / 40)},{step},{4 / (1 + step / 10)},,,")
        if step % 10 == 9:
            rows.append(f"0,,{step},,{4.4 / (1 + step / 12)},{0.5 + step / 100},0.5")
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    times = [
        ("Before training", 0, text),
        ("After 20 steps", 20, "half way"),
        ("After training", 40, f"learned {text}"),
    ]
    (folder / "samples.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "title": title,
                    "step": step,
                    "samples": [{"prompt": f"Tell me {text}", "written": written, "reference": f"Right {text}"}],
                }
            )
            + "\n"
            for title, step, written in times
        ),
        encoding="utf-8",
    )
    names = [f"model.layers.{block}.self_attn.{kind}" for block in range(3) for kind in ("q_proj", "v_proj")]
    lines = [f"{step},{name},16,16,{4 * (1 + i % 3)},2,0.5,0.1" for step in (20, 40) for i, name in enumerate(names)]
    heading = "step,layer,r,rank,effective_rank,stable_rank,rank_used,relative_norm"
    (folder / "insight.csv").write_text("\n".join([heading, *lines]) + "\n", encoding="utf-8")
    about = {
        "started": 1.7e9,
        "command": f"python scripts/train.py lora.r=16 note={text}",
        "overrides": ["lora.r=16", "seed=3", f"note={text}"],
        "planned_steps": 40,
        "adapted": {
            "layers": [
                {"layer": "q_proj", "kind": "Linear", "in → out": "64 → 64", "count": "2", "r": "16", "scale": "8"}
                | {"parameters": "3,000"},
                {"layer": "v_proj", "kind": "Linear", "in → out": "64 → 32", "count": "2", "r": "16", "scale": "8"}
                | {"parameters": "1,000"},
            ],
            "trainable_parameters": 4000,
            "total_parameters": 100000,
        },
        "environment": {"device": text, "torch": "2.13.0"},
    }
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
    if finished:
        (folder / "adapter").mkdir(exist_ok=True)
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(16000))
        result = {
            "status": "finished",
            "val_loss_before": 4.4,
            "val_loss": 2.2,
            "val_accuracy_before": 0.5,
            "val_accuracy": 0.89,
            "trainable_parameters": 4000,
            "total_parameters": 100000,
            "steps": 40,
            "seconds": 262.0,
            "peak_memory_bytes": 1_500_000_000,
            "overrides": about["overrides"],
            "advice": [
                {"rule": "rank unused", "severity": "hint", "sentence": f"Lower r. {text}", "override": "lora.r=8"}
                | {"numbers": {"mean_rank_used": 0.31, "layers": ["q_proj", "v_proj"]}}
            ],
        }
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """What stands on a page: tags with their attributes, and the text between them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._silent = 0
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._silent += tag in ("script", "style")

    def handle_endtag(self, tag):
        self._silent -= tag in ("script", "style")

    def handle_data(self, data):
        if not self._silent:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] for tag, attributes in self.tags if tag == "section" and attributes.get("id")]

    def values(self, tag: str, attribute: str) -> list[str]:
        return [attributes[attribute] for each, attributes in self.tags if each == tag and attribute in attributes]
