"""Trials that end before their last step, by a real study and a real Trainer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import lora_lightning
from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps.pruning import PruneTrial, pruning_in
from lora_lightning.sweeps.study import PRUNED, PRUNERS, SAMPLERS, Note, made_of, open_storage

optuna = pytest.importorskip("optuna")
ROOT = Path(lora_lightning.__file__).parents[1]
STEPS = 6
MEDIAN = {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 3}


class Scripted(pl.LightningModule):
    """Validates to what it was told to, at step 1, 2, …"""

    def __init__(self, losses):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.losses = losses

    def training_step(self, batch):
        return (self.weight - batch).square().mean()

    def validation_step(self, batch):
        self.log("val_loss", float(self.losses[max(0, self.global_step - 1)]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.ones(64, 1))

    val_dataloader = train_dataloader


@pytest.fixture
def study(tmp_path):
    """Three trials that went well, in a study that is searched for the smallest value."""
    study = optuna.create_study(storage=open_storage(tmp_path / "study.journal"), study_name="search")
    for trial_number in range(3):
        trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
        for step in range(1, STEPS + 1):
            trial.report(10.0 - step + 0.1 * trial_number, step)
        study.tell(trial, 10.0 - STEPS)
    return study


@pytest.fixture
def fit(tmp_path, study):
    """fit(losses, **note): train the next trial; gives the trial, the trainer and the callback."""

    def run(losses, *, ckpt_path=None, max_steps=STEPS, trial=None, **settings):
        number = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}).number if trial is None else trial
        fields = {"monitor": "val_loss", "pruner": MEDIAN} | settings
        Note(str(tmp_path / "study.journal"), "search", number, **fields).write(tmp_path / str(number))
        [callback] = pruning_in(tmp_path / str(number))
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=max_steps,
            val_check_interval=1,
            limit_val_batches=1,
            num_sanity_val_steps=1,
            callbacks=[callback],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(Scripted(losses), ckpt_path=ckpt_path)
        return study.trials[number], trainer, callback

    return run


def test_a_hopeless_trial_stops_and_says_why(fit):
    trial, trainer, callback = fit([8.5, 8.0, 9.0, 9.0, 9.0, 9.0])
    assert trainer.global_step == 3
    assert trial.intermediate_values == {1: 8.5, 2: 8.0, 3: 9.0}
    assert callback.ended_by == "pruned at step 3"
    assert trial.user_attrs[PRUNED] == 3


def test_a_good_trial_is_left_alone(fit):
    trial, trainer, callback = fit([5.0, 4.0, 3.0, 2.0, 1.0, 0.5])
    assert trainer.global_step == STEPS
    assert list(trial.intermediate_values) == list(range(1, STEPS + 1))
    assert callback.ended_by is None
    assert PRUNED not in trial.user_attrs


def test_at_its_last_step_a_trial_has_come_to_its_end(fit):
    trial, _, callback = fit([5.0, 4.0, 3.0, 2.0, 1.0, 50.0])
    assert trial.intermediate_values[STEPS] == 50.0
    assert callback.ended_by is None
    assert PRUNED not in trial.user_attrs


def test_a_loss_that_is_no_number_is_hopeless(fit):
    trial, trainer, _ = fit([5.0, float("nan"), 1.0, 1.0, 1.0, 1.0])
    assert trainer.global_step == 2
    assert trial.user_attrs[PRUNED] == 2


def test_a_step_is_reported_once_though_a_fit_goes_on_from_before_it(fit, tmp_path):
    trial, trainer, _ = fit([5.0, 4.0, 3.0, 2.0, 1.0, 0.5], max_steps=3)
    trainer.save_checkpoint(tmp_path / "at3.ckpt")
    again, trainer, _ = fit([0.0] * STEPS, trial=trial.number, ckpt_path=tmp_path / "at3.ckpt")
    assert trainer.global_step == STEPS
    assert again.intermediate_values == {1: 5.0, 2: 4.0, 3: 3.0, 4: 0.0, 5: 0.0, 6: 0.0}


@pytest.mark.parametrize(
    "pruner",
    ["median", "halving", {"_target_": "optuna.pruners.PatientPruner", "wrapped_pruner": MEDIAN, "patience": 1}],
)
def test_any_pruner_of_optunas(fit, pruner):
    for _ in range(3):
        trial, _, callback = fit([5.0, 4.0, 3.0, 2.0, 1.0, 0.5], pruner=pruner)
        assert PRUNED not in trial.user_attrs or pruner == "halving"
    trial, trainer, callback = fit([90.0, 91.0, 92.0, 93.0, 94.0, 95.0], pruner=pruner)
    hopeless = pruner != "median"  # that one waits for five that were told of, and there are three
    assert (trainer.global_step < STEPS) is (PRUNED in trial.user_attrs) is (callback.ended_by is not None) is hopeless


def test_hyperband_asks_for_the_study_itself(fit):
    for scale in (1.0, 1.0, 9.0):
        trial, trainer, _ = fit([scale * value for value in (5.0, 4.0, 3.0, 2.0, 1.0, 0.5)], pruner="hyperband")
        assert (trainer.global_step < STEPS) is (PRUNED in trial.user_attrs)


def test_a_metric_that_is_not_measured(fit):
    with pytest.raises(LoraConfigError, match=r"val_los: pruning goes by it.*did you mean val_loss\?"):
        fit([1.0] * STEPS, monitor="val_los")


def test_no_trial_no_callback(tmp_path):
    assert pruning_in(tmp_path) == []


def test_many_processes_report_at_a_time(study, tmp_path):
    code = (
        "import sys; from pathlib import Path; from lora_lightning.sweeps.study import open_storage\n"
        "storage = open_storage(Path(sys.argv[1])); me = int(sys.argv[2])\n"
        "trial = storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name('search'), me)\n"
        "for step in range(20): storage.set_trial_intermediate_value(trial, step, me + step / 100)\n"
    )
    numbers = [study.ask().number for _ in range(4)]
    command = [sys.executable, "-c", code, str(tmp_path / "study.journal")]
    processes = [subprocess.Popen([*command, str(number)], cwd=ROOT) for number in numbers]
    assert [process.wait(300) for process in processes] == [0] * 4
    for number in numbers:
        assert study.trials[number].intermediate_values == {step: number + step / 100 for step in range(20)}


def test_what_is_made_by_name():
    assert made_of("random", SAMPLERS, seed=3, search_space={}).__class__.__name__ == "RandomSampler"
    assert made_of("halving", PRUNERS, seed=3).__class__.__name__ == "SuccessiveHalvingPruner"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("medium", r"no 'medium' \(did you mean median\?\): one of median, hyperband, halving"),
        ({"_target_": "optuna.pruners.Medium"}, "Medium"),
        ({"_target_": "nowhere.Medium"}, "nowhere"),
        ({"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": -1}, "cannot be negative"),
        ({"n_startup_trials": 1}, "_target_"),
    ],
)
def test_what_cannot_be_made(what, words):
    with pytest.raises(LoraConfigError, match=words):
        made_of(what, PRUNERS)


def test_callbacks_pickle(tmp_path):
    import pickle

    note = Note(str(tmp_path), "search", 0, "val_loss", "median")
    assert pickle.loads(pickle.dumps(PruneTrial(note))).ended_by is None
