"""Parameters, tokens, tied layers and replicated ones under a Trainer: checkpoints, resuming, the folder at the end."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lora_lightning import LoraCallback, LoraConfig, load_adapter, load_from_checkpoint, lora_parameters

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
FIELDS = {
    "beside": {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "trainable_token_indices": [1, 5, 60]},
    "tied": {"target_modules": ["lm_head"], "ensure_weight_tying": True, "layer_replication": [[0, 2], [1, 2]]},
    "parted": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        from transformers import MixtralConfig, MixtralForCausalLM

        sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
        experts = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
        config = MixtralConfig(**sizes, **experts, num_key_value_heads=1, tie_word_embeddings=True)
        torch.manual_seed(1)
        self.model = MixtralForCausalLM(config)

    def training_step(self, batch, index):
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)


def _trainer(folder, steps, callback):
    return pl.Trainer(
        max_steps=steps,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)],
    )


def _rows():
    return DataLoader(torch.randint(0, 64, (4, 6), generator=torch.Generator().manual_seed(2)), batch_size=1)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FIELDS)
def test_a_run_goes_on_and_its_folder_loads(name, tokens, tmp_path):
    config = LoraConfig(r=2, **FIELDS[name])
    base = copy.deepcopy(Net().model)
    whole, second = Net(), Net()
    _trainer(tmp_path / "whole", 3, LoraCallback(config)).fit(whole, _rows())
    state = torch.load(tmp_path / "whole" / "step=2.ckpt", weights_only=True)["state_dict"]
    assert set(state) == set(lora_parameters(whole))
    callback = LoraCallback(config)
    _trainer(tmp_path / "second", 3, callback).fit(second, _rows(), ckpt_path=tmp_path / "whole" / "step=2.ckpt")
    for key, parameter in lora_parameters(whole).items():
        assert torch.equal(lora_parameters(second)[key], parameter), key
    logits = second.eval().model(tokens).logits
    load_adapter(base, callback.adapter_path)
    keys = load_file(f"{callback.adapter_path}/adapter_model.safetensors").keys()
    assert ("base_model.model.lm_head.lora_B.weight" in keys) == (name == "tied")  # as PEFT has it
    torch.testing.assert_close(base.eval()(tokens).logits, logits, atol=1e-6, rtol=1e-5)
    again = load_from_checkpoint(Net, tmp_path / "whole" / "step=3.ckpt").eval()
    assert torch.equal(again.model(tokens).logits, logits)
