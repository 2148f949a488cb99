"""Direct preference optimisation: the adapted model is the policy, the same model without its adapter the reference.

No second model lies in memory: inside ``lora_disabled`` the layers answer as the base does.

    python examples/dpo.py                                    # a small chat model; BBC stories and their headlines
    python examples/dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data preferences.jsonl

``preferences.jsonl`` has rows of prompt, chosen and rejected, all three text.
Source: Rafailov et al., Direct Preference Optimization, arXiv 2305.18290, equation 7.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lora_lightning import LoraCallback, LoraConfig, lora_disabled
from lora_lightning.data.bbc import read_stories
from lora_lightning.tasks.demo import is_demo, prepare_demo
from lora_lightning.tasks.loss import token_losses

Batch = dict[str, Tensor]  # the chosen answers' rows, then the rejected ones'


class DPO(pl.LightningModule):
    """Learns which of two answers is the better one.

    Args:
        model: Name or folder of a chat model.
        beta: How dear it is to move away from the reference.
        learning_rate: Of the adapter.
    """

    def __init__(self, model: str, beta: float = 0.1, learning_rate: float = 2e-4) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(model)
        self.beta = beta
        self.learning_rate = learning_rate

    def log_probabilities(self, batch: Batch) -> Tensor:
        """Of each row's answer, given its prompt: (B,)."""
        scored_BT = batch["labels"][:, 1:] != -100
        losses_K = token_losses(self.model, batch).losses_K
        return losses_K.new_zeros(scored_BT.shape).masked_scatter(scored_BT, -losses_K).sum(1)

    def margins(self, batch: Batch) -> Tensor:
        """How much more than the reference the policy prefers the chosen answer: (B / 2,)."""
        with torch.no_grad(), lora_disabled(self.model):
            reference_B = self.log_probabilities(batch)
        chosen, rejected = (self.log_probabilities(batch) - reference_B).chunk(2)
        return self.beta * (chosen - rejected)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the paper."""
        margins = self.margins(batch)
        self.log("accuracy", (margins > 0).float().mean(), prog_bar=True)
        return -functional.logsigmoid(margins).mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """How often, and by how much, the chosen answer has won."""
        margins = self.margins(batch)
        self.log("val_accuracy", (margins > 0).float().mean(), batch_size=len(margins))
        self.log("val_margin", margins.mean(), batch_size=len(margins))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Whatever is handed in, only the adapter trains."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Pairs:
    """Makes a batch of some preferences."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, str]]) -> Batch:
        """Rows of prompt, chosen and rejected; what is trained are the answers."""
        encoded = [self._encode(row["prompt"], row[answer]) for answer in ("chosen", "rejected") for row in rows]
        length = max(len(ids) for ids, _ in encoded)
        ids_BT = torch.full((len(encoded), length), self.tokenizer.pad_token_id)
        labels_BT = torch.full((len(encoded), length), -100)
        mask_BT = torch.zeros(len(encoded), length, dtype=torch.long)
        for place, (ids, prompt_length) in enumerate(encoded):
            ids_BT[place, : len(ids)] = torch.tensor(ids)
            labels_BT[place, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
            mask_BT[place, : len(ids)] = 1
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}

    def _encode(self, prompt: str, answer: str) -> tuple[list[int], int]:
        asked = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        prompt_ids = self.tokenizer(text, add_special_tokens=False).input_ids
        answer_ids = self.tokenizer(answer + self.tokenizer.eos_token, add_special_tokens=False).input_ids
        return prompt_ids + answer_ids, len(prompt_ids)


def headlines(words: int = 40) -> list[dict[str, str]]:
    """The story's own headline against that of another story of the same topic."""
    stories = read_stories()
    return [
        {
            "prompt": "Write a headline for this news story:\n\n" + " ".join(story.body.split()[:words]),
            "chosen": story.headline,
            "rejected": other.headline,
        }
        for story, other in zip(stories, [*stories[7:], *stories[:7]], strict=True)
        if story.topic == other.topic
    ]


def read(path: Path) -> list[dict[str, str]]:
    """Rows of prompt, chosen and rejected."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def main() -> None:
    """Train on the preferences that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="demo:smollm2-135m-instruct", help="a chat model (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="a JSONL file (default: headlines of BBC stories)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("outputs/dpo"), help="default: %(default)s")
    chosen = parser.parse_args()

    pl.seed_everything(0)
    name = str(prepare_demo(chosen.model)) if is_demo(chosen.model) else chosen.model
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = headlines() if chosen.data is None else read(chosen.data)
    if len(rows) < 4:
        parser.error(f"at least 4 rows are needed, of which one is held out; {chosen.data} has {len(rows)}")
    order = torch.randperm(len(rows)).tolist()
    held = [rows[place] for place in order[: min(32, len(rows) // 4)]]
    trained = [rows[place] for place in order[len(held) :]]
    pairs = Pairs(tokenizer)
    trainer = pl.Trainer(
        max_steps=chosen.steps,
        default_root_dir=chosen.out,
        logger=False,
        enable_checkpointing=False,
        callbacks=[LoraCallback(LoraConfig(r=16, lora_alpha=32))],
    )
    dpo = DPO(name)
    trainer.fit(dpo, DataLoader(trained, batch_size=4, shuffle=True, collate_fn=pairs))
    trainer.validate(dpo, DataLoader(held, batch_size=8, collate_fn=pairs))


if __name__ == "__main__":
    main()
