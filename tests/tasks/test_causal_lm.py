import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, IterableDataset

from lora_lightning.errors import LoraConfigError
from lora_lightning.tasks import CausalLM
from lora_lightning.tasks.schedule import constant, warmup_constant, warmup_cosine, warmup_linear


class Stream(IterableDataset):
    """Has no length, and says so to whoever asks."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        while True:
            yield from self.rows


def stacked(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def test_validation_is_weighted_by_tokens(fit, rows):
    module = CausalLM("demo:tiny-llama", learning_rate=0.0)
    trainer = fit(module, rows, 3, validation=rows)
    with torch.no_grad():
        expected = CausalLM("demo:tiny-llama").model(**stacked(rows)).loss
    torch.testing.assert_close(trainer.callback_metrics["val_loss"], expected, rtol=1e-5, atol=0)
    assert trainer.callback_metrics["val_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_keeps_exact_counts(fit, rows, precision):
    module = CausalLM("demo:tiny-llama", learning_rate=1e-3)
    counts = []
    update = module._means["val"].update
    module._means["val"].update = lambda value, weight: counts.append((value, weight)) or update(value, weight)
    trainer = fit(module, rows * 40, 32, validation=rows * 40, precision=precision)
    values, weights = (torch.stack([pair[index].double() for pair in counts]) for index in range(2))
    assert trainer.callback_metrics["val_loss"] == pytest.approx(
        float((values * weights).sum() / weights.sum()), rel=1e-2 if precision == "bf16-true" else 1e-5
    )
    assert weights.sum() > 256
    assert module._means["val"].mean_value.dtype is torch.float32


def test_training_lowers_the_loss_and_logs(fit, rows):
    module = CausalLM("demo:tiny-llama", learning_rate=1e-2)
    trainer = fit(module, rows, 4, validation=rows, max_epochs=8)
    assert trainer.callback_metrics["val_loss"] < 3.0 < math.log(384)
    assert module.tokens_seen == 8 * sum(int(row["attention_mask"].sum()) for row in rows)
    assert trainer.progress_bar_metrics["tokens_per_second"] == pytest.approx(module.tokens_per_second)
    assert module.tokens_per_second > 0
    assert "train_loss" in trainer.progress_bar_metrics


def test_rebuilds_from_hyper_parameters(rows, tmp_path):
    module = CausalLM(
        {"name": "demo:tiny-llama", "attn_implementation": "eager"},
        optimizer=partial(torch.optim.SGD, lr=0.1),
        scheduler=constant,
        max_new_tokens=5,
    )
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DataLoader(rows, 4))
    path = trainer.checkpoint_callback.best_model_path
    assert torch.load(path, weights_only=True)["hyper_parameters"]["model"]["attn_implementation"] == "eager"
    again = CausalLM.load_from_checkpoint(path)
    assert again.max_new_tokens == 5
    assert again.model.config._attn_implementation == "eager"
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])


def test_optimizer_gets_what_trains(fit, rows):
    module = CausalLM("demo:tiny-llama", optimizer=partial(torch.optim.SGD, lr=0.1))
    module.model.requires_grad_(False)
    module.model.model.norm.weight.requires_grad_(True)
    trainer = fit(module, rows, 4)
    (group,) = trainer.optimizers[0].param_groups
    assert [id(weight) for weight in group["params"]] == [id(module.model.model.norm.weight)]
    module.model.requires_grad_(False)
    with pytest.raises(LoraConfigError, match="nothing to train"):
        module.configure_optimizers()


def test_scheduler_is_told_the_steps(fit, rows):
    rates = []
    module = CausalLM("demo:tiny-llama", learning_rate=1.0, scheduler=partial(warmup_cosine, warmup=0.25, final=0.1))
    module.on_train_batch_start = lambda *_: rates.append(module.optimizers().param_groups[0]["lr"])
    fit(module, rows, 1, accumulate_grad_batches=2, max_epochs=2)
    assert len(rates) == 16
    steps = rates[::2]  # 8 optimizer steps: 2 of warm-up, then half a cosine from 1 to a tenth
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * done / 6)) / 2 for done in range(6)]
    assert steps == pytest.approx([0.0, 0.5, *cosine])
    assert rates[1::2] == pytest.approx(steps)


def test_other_schedules():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

    def rates(make, **settings):
        scheduler = make(optimizer, **settings)
        seen = []
        for _ in range(4):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        optimizer.param_groups[0].pop("initial_lr")
        optimizer.param_groups[0]["lr"] = 1.0
        return seen

    assert rates(constant) == [1, 1, 1, 1]
    assert rates(warmup_constant, num_training_steps=4, warmup=0.5) == [0, 0.5, 1, 1]
    assert rates(warmup_linear, num_training_steps=4, warmup=0.0) == [1, 0.75, 0.5, 0.25]


def test_schedulers_that_know_their_steps(fit, rows):
    for scheduler in (
        partial(warmup_linear, num_training_steps=77),
        partial(torch.optim.lr_scheduler.StepLR, step_size=1),
    ):
        trainer = fit(CausalLM("demo:tiny-llama", scheduler=scheduler), rows, 8)
        assert trainer.lr_scheduler_configs[0].interval == "step"


def test_streams(fit, rows):
    module = CausalLM("demo:tiny-llama", scheduler=warmup_cosine)
    trainer = fit(module, Stream(rows), 2, max_epochs=-1, max_steps=3)
    assert trainer.global_step == 3
    with pytest.raises(LoraConfigError, match="max_steps"):
        fit(CausalLM("demo:tiny-llama", scheduler=warmup_cosine), Stream(rows), 2, max_epochs=1)
    with pytest.raises(LoraConfigError, match="max_steps"):
        fit(CausalLM("demo:tiny-llama", scheduler=warmup_cosine), Stream(rows), 2, max_epochs=-1)


def test_predict(module, rows):
    prompts = ["the minister", "a story"]
    assert module.predict_step(prompts) == module.generate_text(prompts)
    scores = module.predict_step(stacked(rows))
    with torch.no_grad():
        expected = [module.model(**{key: value[None] for key, value in row.items()}).loss for row in rows]
    torch.testing.assert_close(scores, torch.stack(expected), equal_nan=True, atol=1e-5, rtol=1e-5)
    assert scores.isnan().tolist() == [number == 4 for number in range(8)]


def test_lightning_cli(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("""
model:
  class_path: lora_lightning.tasks.CausalLM
  init_args:
    model:
      name: demo:tiny-llama
      dtype: float32
    optimizer:
      class_path: torch.optim.SGD
      init_args:
        lr: 0.25
    max_new_tokens: 7
""")
    cli = LightningCLI(args=["--config", str(config)], run=False, save_config_callback=None)
    assert cli.model.hparams.max_new_tokens == 7
    assert cli.model.hparams.model["dtype"] == "float32"
    optimizer = cli.model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.25
