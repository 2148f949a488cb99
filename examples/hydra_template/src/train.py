"""Trains what the configuration says.

- ``cd examples/hydra_template``
- ``python src/train.py``
- ``python src/train.py lora=high_capacity lora.r=32``
- ``python src/train.py -m lora.r=2,4,8``
"""

import sys
from pathlib import Path

import hydra
import lightning.pytorch as pl
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # what rootutils does in the template


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> float:
    """Train, then test the best checkpoint; returns the validation's accuracy for sweepers."""
    pl.seed_everything(cfg.seed, workers=True)
    data = hydra.utils.instantiate(cfg.data)
    model = hydra.utils.instantiate(cfg.model)
    callbacks = [hydra.utils.instantiate(callback) for callback in cfg.callbacks.values()]
    trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks)
    trainer.fit(model, data, ckpt_path=cfg.ckpt_path)
    accuracy = float(trainer.callback_metrics["val/acc"])
    trainer.test(model, data, ckpt_path=trainer.checkpoint_callback.best_model_path)
    return accuracy


if __name__ == "__main__":
    main()
