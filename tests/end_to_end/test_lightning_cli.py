"""A LightningCLI project: module, data and the LoRA callback from one YAML."""

import os
import subprocess
import sys

import torch

SCRIPT = """
from lightning.pytorch.cli import LightningCLI
from lora_lightning.data import TinyText
from lora_lightning.tasks import CausalLM

if __name__ == "__main__":
    LightningCLI(CausalLM, TinyText, save_config_callback=None)
"""
CONFIG = """
seed_everything: 3
trainer:
  max_steps: 4
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lora_lightning.LoraCallback
      init_args:
        config:
          r: 4
          lora_alpha: 8
          target_modules: [q_proj, v_proj]
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        every_n_train_steps: 4
model:
  model: demo:tiny-llama
  learning_rate: 0.01
data:
  rows: 32
  val_rows: 4
optimizer:
  class_path: torch.optim.SGD
  init_args:
    lr: 0.05
"""


def test_trains_from_a_yaml(tmp_path):
    (tmp_path / "cli.py").write_text(SCRIPT)
    (tmp_path / "config.yaml").write_text(CONFIG)
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "cli.py", "fit", "--config", "config.yaml"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "LoRA: 4 layers adapted, r=4, scale 2.0" in done.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert {name.rpartition(".")[2] for name in checkpoint["state_dict"]} == {"lora_A", "lora_B"}
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 0.05
