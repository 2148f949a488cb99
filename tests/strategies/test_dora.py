"""DoRA where processes share the work: each spread network computes, trains, resumes and merges as the whole one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("warm_starts")

COMPUTE = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from lora_lightning import LoraConfig, inject_lora, lora_parameters, merge_lora
from lora_lightning.injection.tensors import whole
from lora_lightning.strategies.blocks import WrapBlocks
from lora_lightning.strategies.parallelize import shard

kind, checkpointing = arguments[0], arguments[1] == "checkpointing"
sizes = (1, 2) if kind == "tp" else (2, 1)
mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data_parallel", "tensor_parallel"))
config = LoraConfig(r=4, use_dora=True, init_lora_weights=False)


def network():
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True,
    ))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


def adapted():
    model = network()
    inject_lora(model, config, seed=1)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.3)
    return model.train()


def results(model):
    logits = model(torch.arange(18).view(2, 9)).logits
    logits.float().logsumexp(-1).square().mean().backward()
    return whole(logits.detach()), {name: whole(p.grad) for name, p in lora_parameters(model).items()}


alone = adapted()
started = {name: value.detach().clone() for name, value in alone.named_parameters()}
logits, gradients = results(alone)
assert sum("magnitude" in name for name in gradients) == 14

if kind == "fsdp":
    model = adapted()
    ours = [parameter for name, parameter in model.named_parameters() if "lora" in name]
    model = FSDP(model, auto_wrap_policy=WrapBlocks(), ignored_states=ours, device_id=torch.device("cpu"))
else:
    model = shard(adapted(), mesh, activation_checkpointing=checkpointing)
for _ in range(2):
    model.zero_grad()
    given, given_gradients = results(model)
    assert (given - logits).abs().max() < 1e-5 * logits.abs().max()
    assert given_gradients.keys() == gradients.keys()
    for name, gradient in given_gradients.items():
        assert (gradient - gradients[name]).abs().max() < 1e-6, name

# New values in the parts are noticed, though the memory that whole weights are gathered into may be the same.
for twin in (alone, model):
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.mul_(3)
    twin.zero_grad()
given, given_gradients = results(model)
logits, gradients = results(alone)
assert (given - logits).abs().max() < 1e-5 * logits.abs().max()

if kind != "fsdp" and not checkpointing:
    # Injected after it was spread: lengths come from all parts of a weight.
    late = shard(network(), mesh)
    inject_lora(late, config, seed=1)
    for name, parameter in late.named_parameters():
        if "magnitude" in name:
            assert not isinstance(parameter, DTensor)
            assert torch.allclose(parameter * 1.3, started[name], rtol=1e-6), name
    before = adapted()
    inject = {n: p for n, p in before.named_parameters() if "lora" in n}
    with torch.no_grad():
        for name, parameter in late.named_parameters():
            if "lora" in name:
                parameter.copy_(inject[name])
    merge_lora(late)
    merge_lora(before)
    for (name, got), wanted in zip(late.named_parameters(), before.parameters(), strict=True):
        assert torch.allclose(whole(got.detach()), wanted, rtol=1e-5, atol=1e-7), name
"""


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [("fsdp2", ""), ("tp", ""), ("fsdp", ""), pytest.param("fsdp2", "checkpointing", marks=pytest.mark.slow)],
)
def test_two_processes_compute_what_one_computes(processes, kind, checkpointing):
    processes(COMPUTE, kind, checkpointing)


TRAIN = """
import sys
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM
from lora_lightning import LoraCallback, LoraConfig, load_base, lora_state_dict, meta_parameters, save_adapter
from lora_lightning.injection.tensors import whole
from lora_lightning.strategies.mesh import MeshStrategy
from lora_lightning.strategies.parallelize import shard

kind, folder, out = sys.argv[1:]
torch.set_num_threads(1)
spread = kind in ("fsdp2", "tp")


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is not None:
            return
        if not spread:
            self.net = LlamaForCausalLM.from_pretrained(folder)
            return
        with meta_parameters():
            self.net = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
        shard(self.net, self.device_mesh, precision=self.trainer.precision)
        load_base(self.net, folder)

    def training_step(self, batch, batch_idx):
        (tokens,) = batch
        if kind in ("ddp", "fsdp", "fsdp2"):
            tokens = tokens[self.global_rank :: 2]
        return self.net(input_ids=tokens, labels=tokens, use_cache=False).loss

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.net(input_ids=batch[0], labels=batch[0], use_cache=False).loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-5)


data = TensorDataset(torch.randint(0, 65, (12, 9), generator=torch.Generator().manual_seed(1)))
strategies = {"one": "auto", "fsdp2": MeshStrategy(), "tp": MeshStrategy(tensor_parallel_size=2)}


def fit(epochs, path=None):
    module = Module()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1 if kind == "one" else 2, strategy=strategies.get(kind, kind),
        logger=False, use_distributed_sampler=False, default_root_dir=out, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
        callbacks=[LoraCallback(LoraConfig(r=2, lora_alpha=4, use_dora=True, init_lora_weights=False))],
    )
    loader = DataLoader(data, batch_size=4)
    trainer.fit(module, loader, loader, ckpt_path=path)
    return trainer, module


trainer, _ = fit(1)
trainer.save_checkpoint(f"{out}/half.ckpt")
if kind != "one":
    torch.distributed.barrier()
    strategies = {"fsdp2": MeshStrategy(), "tp": MeshStrategy(tensor_parallel_size=2)}
trainer, module = fit(2, f"{out}/half.ckpt")
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
    (tmp_path / "script.py").write_text(TRAIN)
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


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of a base, and what one process ends with."""
    folder = tmp_path_factory.mktemp("dora")
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=65, num_hidden_layers=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    return folder / "base", _run(folder, "one", folder / "base")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tp"])
def test_a_run_of_two_processes_that_is_interrupted_ends_as_one_process_does(tmp_path, whole_run, kind):
    folder, one = whole_run
    assert sum(name.endswith("lora_magnitude") for name in one) == 14
    other = _run(tmp_path, kind, folder)
    assert other.keys() == one.keys()
    for name, value in one.items():
        assert (other[name] - value).abs().max() < 2e-5, name
