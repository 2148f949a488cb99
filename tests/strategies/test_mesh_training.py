"""Trainings whose network never was whole in a process end as one process with the whole network ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("warm_starts")

MODULE = """
import sys
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM
from lora_lightning import LoraCallback, LoraConfig, load_base, lora_state_dict, meta_parameters
from lora_lightning.injection.tensors import whole
from lora_lightning.strategies.mesh import MeshStrategy
from lora_lightning.strategies.parallelize import shard

kind, folder, out = sys.argv[1:]
torch.set_num_threads(1)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is not None:
            return
        with meta_parameters():
            self.net = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
        if self.device_mesh is not None:
            shard(self.net, self.device_mesh, precision=self.trainer.precision)
        load_base(self.net, folder)

    def training_step(self, batch, batch_idx):
        (tokens,) = batch
        if kind == "fsdp2":
            tokens = tokens[self.global_rank :: 2]
        return self.net(input_ids=tokens, labels=tokens, use_cache=False).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-5)


data = TensorDataset(torch.randint(0, 65, (12, 9), generator=torch.Generator().manual_seed(1)))
module = Module()
strategy = {"one": "auto", "fsdp2": MeshStrategy(), "tp": MeshStrategy(tensor_parallel_size=2)}[kind]
trainer = pl.Trainer(
    max_epochs=2, accelerator="cpu", devices=1 if kind == "one" else 2, strategy=strategy, logger=False,
    use_distributed_sampler=False, default_root_dir=out, enable_progress_bar=False, enable_model_summary=False,
    enable_checkpointing=False, callbacks=[LoraCallback(LoraConfig(r=2, lora_alpha=4))],
)
trainer.fit(module, DataLoader(data, batch_size=4))
state = {name: whole(value) for name, value in lora_state_dict(module).items()}
torch.save(state, f"{out}/rank{trainer.global_rank}.pt")
if kind != "one":
    torch.distributed.barrier()
    import os
    os._exit(0)  # torch's threads now and then abort a process on its way through the interpreter's end
"""


def _run(tmp_path, kind: str, folder) -> dict[str, torch.Tensor]:
    out = tmp_path / kind
    out.mkdir()
    (tmp_path / "script.py").write_text(MODULE)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", kind, folder, out],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    states = [torch.load(path, weights_only=True) for path in sorted(out.glob("rank*.pt"))]
    assert len(states) == (1 if kind == "one" else 2)
    for state in states[1:]:
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())
    return states[0]


@pytest.mark.slow
def test_a_network_loaded_in_parts_trains_as_a_whole_one(tmp_path):
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=65, num_hidden_layers=2, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    one = _run(tmp_path, "one", tmp_path / "base")
    assert any(value.abs().max() > 1e-3 for name, value in one.items() if name.endswith("lora_B"))
    for kind in ("fsdp2", "tp"):
        other = _run(tmp_path, kind, tmp_path / "base")
        assert other.keys() == one.keys()
        for name, value in one.items():
            assert (other[name] - value).abs().max() < 2e-5, (kind, name)
