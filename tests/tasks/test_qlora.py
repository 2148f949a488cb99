"""QLoRA from the settings to the files: a base in 4 bits, trained, checkpointed, resumed, read by PEFT."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import lora_lightning
from lora_lightning import LoraCallback, LoraConfig, LoraConfigError, load_adapter, lora_parameters
from lora_lightning.layers import is_quantised
from lora_lightning.layers.bits import bits_of
from lora_lightning.sweeps.packed.packable import PackableJob, why_alone
from lora_lightning.tasks import CausalLM, ModelConfig, load_model

pytest.importorskip("bitsandbytes")

ROOT = Path(lora_lightning.__file__).parents[1]
TINY = {"name": "demo:tiny-llama", "quantisation": "nf4"}


def _module(**settings):
    torch.manual_seed(1)
    return CausalLM({**TINY, **settings}, learning_rate=1e-2)


def _computing_alike(model):
    """For inference bitsandbytes lays weights out anew on some CPUs, and rounds: PEFT's layers are not to, as ours."""
    for layer in model.modules():
        if is_quantised(layer):
            layer.support_avx512bf16_for_cpu = False
    return model


def _trainer(folder, *callbacks, **settings):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        limit_val_batches=0,
        callbacks=[LoraCallback(LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05)), *callbacks],
        **{"max_epochs": 2, "enable_checkpointing": bool(callbacks), **settings},
    )


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("fp4", False), ("int8", True)])
def test_a_base_is_read_into_few_bits(kind, double):
    model = load_model(ModelConfig("demo:tiny-llama", quantisation=kind, double_quantisation=double), "causal_lm")
    assert model.training
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [is_quantised(module) for module in linear] == [module is not model.lm_head for module in linear]
    bits = bits_of(model.model.layers[0].self_attn.q_proj)
    if kind != "int8":
        assert (bits.state.quant_type, bits.state.nested) == (kind, double)
    plain = load_model(ModelConfig("demo:tiny-llama"), "causal_lm")
    tokens = torch.arange(12).view(2, 6)
    expected = plain(tokens).logits
    assert (model(tokens).logits - expected).norm() < 0.5 * expected.norm()


def test_settings_that_do_not_go_together_are_told():
    with pytest.raises(LoraConfigError, match=r"quantisation must be one of nf4.*'nf8' \(did you mean nf4"):
        ModelConfig("x", quantisation="nf8")
    with pytest.raises(LoraConfigError, match="in_parts reads plain weights only"):
        ModelConfig("x", quantisation="nf4", in_parts=True)


def test_a_missing_package_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    with pytest.raises(LoraConfigError, match=r"needs bitsandbytes: pip install 'lora-lightning\[quantised\]'"):
        load_model(ModelConfig("demo:tiny-llama", quantisation="nf4"), "causal_lm")


def test_files_that_are_quantised_stay_so(tmp_path):
    load_model(ModelConfig("demo:tiny-llama", quantisation="nf4"), "causal_lm").save_pretrained(tmp_path)
    again = load_model(ModelConfig(str(tmp_path)), "causal_lm")
    assert is_quantised(again.model.layers[0].mlp.up_proj)
    with pytest.raises(LoraConfigError, match="quantised already"):
        load_model(ModelConfig(str(tmp_path), quantisation="nf4"), "causal_lm")


def _losses(trainer_losses):
    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer_losses.append(float(outputs["loss"]))

    return Losses()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_and_its_files_are_the_plain_ones(tmp_path, rows, checkpointing):
    module, losses = _module(gradient_checkpointing=checkpointing), []
    base = _computing_alike(copy.deepcopy(module.model))
    trainer = _trainer(tmp_path, _losses(losses), ModelCheckpoint(tmp_path, save_last=True), max_epochs=8)
    trainer.fit(module, DataLoader(rows, 4))
    assert losses[-1] < losses[0] - 0.3
    assert all("lora_" in name for name in lora_parameters(module))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert set(state) == set(lora_parameters(module))
    tokens = rows[0]["input_ids"][None]
    module.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as that of another base
        expected = module.model(tokens).logits
        load_adapter(again := copy.deepcopy(base), trainer.callbacks[0].adapter_path)
        torch.testing.assert_close(again.eval()(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    from peft import PeftModel

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(base, trainer.callbacks[0].adapter_path).eval()
        assert type(theirs.base_model.model.model.layers[0].mlp.up_proj).__module__ == "peft.tuners.lora.bnb"
        torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_resumes_exactly(tmp_path, rows):
    whole = _module()
    _trainer(tmp_path / "a", max_steps=4).fit(whole, DataLoader(rows, 2))
    first = _module()
    saving = ModelCheckpoint(tmp_path / "b", every_n_train_steps=2, save_top_k=-1)
    _trainer(tmp_path / "b", saving, max_steps=2).fit(first, DataLoader(rows, 2))
    resumed = _module()
    _trainer(tmp_path / "c", max_steps=4).fit(resumed, DataLoader(rows, 2), ckpt_path=saving.best_model_path)
    ours = lora_parameters(resumed)
    assert all(torch.equal(ours[name], value) for name, value in lora_parameters(whole).items())


@pytest.mark.parametrize("config", [{"r": 4}, {"r": 4, "use_dora": True}])
def test_lightnings_own_plugin_quantises_before_injection(tmp_path, rows, config):
    from lightning.pytorch.plugins import BitsandbytesPrecision

    module = CausalLM("demo:tiny-llama", learning_rate=1e-2)
    losses: list[float] = []
    trainer = _trainer(tmp_path, _losses(losses), max_epochs=6)
    # The Trainer refuses it on CPUs, where bitsandbytes has not always worked.
    trainer.strategy.precision_plugin = BitsandbytesPrecision("nf4-dq", torch.float32)
    trainer.callbacks[0].config = LoraConfig(**config)
    trainer.fit(module, DataLoader(rows, 4))
    layer = module.model.model.layers[0].self_attn.q_proj
    assert (layer.weight.shape, layer.lora_A.shape, layer.lora_A.dtype) == ((2048, 1), (4, 64), torch.float32)
    assert losses[-1] < losses[0] - 0.3


# ---- settings


def test_qlora_is_one_word(composed):
    assert composed().model.quantisation is None
    cfg = composed("lora=qlora")
    assert (cfg.model.quantisation, cfg.model.double_quantisation, cfg.lora.r) == ("nf4", True, 16)
    assert cfg.lora.target_modules == "all-linear"
    ModelConfig.of(cfg.model)
    assert composed("lora=qlora", "model=tiny_llama", "experiment=smoke").model.quantisation == "nf4"
    assert composed("lora=qlora", "model.quantisation=int8").model.quantisation == "int8"
    assert composed("model.quantisation=fp4").model.quantisation == "fp4"


def test_it_is_a_plain_preset_in_somebody_elses_app(tmp_path):
    (tmp_path / "app.py").write_text(
        "import hydra\nfrom omegaconf import OmegaConf\n\n@hydra.main(version_base='1.3', config_path=None)\n"
        "def app(cfg):\n    print(sorted(cfg), sorted(cfg.net), cfg.net.peft.r)\n\napp()\n"
    )
    done = subprocess.run(
        [sys.executable, "app.py", "+lora@net.peft=qlora", "hydra.run.dir=."],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "['net'] ['peft'] 16", done.stderr


def test_a_packed_sweep_leaves_it_to_train_alone(composed):
    from omegaconf import OmegaConf

    from lora_lightning.sweeps.runs import Job

    cfg = OmegaConf.to_container(composed("lora=qlora", "experiment=smoke"), resolve=False)
    config = {"model": {"quantisation": "nf4"}, "task": cfg["task"]}
    assert "model.quantisation=nf4 keeps its base in few bits" in why_alone(PackableJob(Job(0, (), Path("0")), config))


# ---- the real thing


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_model_in_4_bits_learns_headlines_and_peft_reads_it(tmp_path):
    """SmolLM2-135M in nf4, ten steps on BBC headlines."""
    folder = tmp_path / "run"
    settings = [
        "lora=qlora",
        "trainer.max_steps=10",
        "data.val_rows=8",
        "data.samples=1",
        "trainer.val_check_interval=10",
    ]
    command = [sys.executable, "scripts/train.py", *settings, f"hydra.run.dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    import json

    result = json.loads((folder / "result.json").read_text())
    assert result["val_loss"] < result["val_loss_before"] - 0.1
    from peft import PeftModel

    def base():
        model = load_model(ModelConfig("demo:smollm2-135m-instruct", quantisation="nf4"), "causal_lm")
        return _computing_alike(model).eval()

    tokens = torch.randint(0, 49_152, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = base()
        before = ours(tokens).logits
        load_adapter(ours, folder / "adapter")
        logits = ours(tokens).logits
        theirs = PeftModel.from_pretrained(base(), folder / "adapter").eval()(tokens).logits
    assert (logits - before).abs().max() > 0.1
    torch.testing.assert_close(theirs, logits, rtol=0, atol=1e-3)
