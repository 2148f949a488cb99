"""All optimizers in a Trainer under FSDP2 and tensor parallel: as on one device, and going on with its checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("warm_starts")

SCRIPT = """
import sys
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaForCausalLM
from lora_lightning import LoraCallback, LoraConfig, lora_state_dict
from lora_lightning.injection.tensors import whole
from lora_lightning.optim import lora_fa, lora_plus, lora_rite, riemannian, schedule_free
from lora_lightning.strategies.mesh import MeshStrategy
from lora_lightning.strategies.parallelize import shard

kind, out = sys.argv[1:]
torch.set_num_threads(1)
MAKE = {
    "lora_plus": lambda m: lora_plus(m, lr=1e-3, eps=1e-5),
    "lora_fa": lambda m: lora_fa(m, lr=1e-3, eps=1e-5),
    "riemannian": lambda m: riemannian(m, lr=1e-3, eps=1e-5),
    "lora_rite": lambda m: lora_rite(m, lr=1e-4, eps=1e-4),
    "schedule_free": lambda m: schedule_free([p for p in m.parameters() if p.requires_grad], lr=1e-2, eps=1e-5),
}


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = LlamaForCausalLM.from_pretrained(f"{out}/base")
        self.spread = False

    def configure_model(self):
        if kind != "one" and not self.spread:
            self.spread = True
            shard(self.net, self.device_mesh, precision=self.trainer.precision)

    def training_step(self, batch, batch_idx):
        tokens = batch[0][self.global_rank :: 2] if kind == "fsdp2" else batch[0]
        return self.net(input_ids=tokens, labels=tokens, use_cache=False).loss

    def configure_optimizers(self):
        return MAKE[name](self)


data = TensorDataset(torch.randint(0, 65, (12, 9), generator=torch.Generator().manual_seed(1)))


def fit(epochs, path=None):
    module = Module()
    where = {"accelerator": "cpu", "devices": 1}
    if kind != "one":
        where = {"strategy": MeshStrategy(tensor_parallel_size=2 if kind == "tp" else 1), "devices": 2}
        where["accelerator"] = "cpu"
    trainer = pl.Trainer(
        max_epochs=epochs, **where, logger=False, use_distributed_sampler=False, default_root_dir=out,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[LoraCallback(LoraConfig(r=2, lora_alpha=4, init_lora_weights="gaussian"))],
    )
    trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=path)
    return trainer, module


for name in MAKE:
    path = f"{out}/{name}.ckpt"
    if kind == "one":
        fit(1)[0].save_checkpoint(path)
    trainer, module = fit(2, path)
    state = {key: whole(value) for key, value in lora_state_dict(module).items()}
    torch.save(state, f"{out}/{kind}_{name}_{trainer.global_rank}.pt")
if kind != "one":
    torch.distributed.barrier()
    import os
    os._exit(0)  # torch's threads now and then abort a process on its way through the interpreter's end
"""


@pytest.mark.slow
def test_one_devices_checkpoint_goes_on_spread_over_two(tmp_path):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=65, **sizes)).save_pretrained(tmp_path / "base")
    (tmp_path / "script.py").write_text(SCRIPT)
    for kind in ("one", "fsdp2", "tp"):
        done = subprocess.run(
            [sys.executable, tmp_path / "script.py", kind, tmp_path],
            env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    names = [path.stem for path in tmp_path.glob("*.ckpt")]
    assert len(names) == 5
    for name in names:
        wanted = torch.load(tmp_path / f"one_{name}_0.pt", weights_only=True)
        for kind in ("fsdp2", "tp"):
            for rank in range(2):
                found = torch.load(tmp_path / f"{kind}_{name}_{rank}.pt", weights_only=True)
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
