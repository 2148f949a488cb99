import pytest

from lora_lightning.sweeps.report.collect import collect
from lora_lightning.sweeps.report.importance import importance_bars, importances
from tests.sweeps.report.folders import believable, write_sweep

optuna = pytest.importorskip("optuna")


def study_in(folder, trials):
    """A study in which one setting decides and another does nothing."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    study = optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler(seed=0))

    def objective(trial):
        rate = trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
        trial.suggest_categorical("lora.r", [4, 8, 16])
        return (rate - 1e-3) ** 2

    study.optimize(objective, trials)


def test_what_decides_is_important(tmp_path):
    study_in(tmp_path, 40)
    found = importances(tmp_path)
    assert list(found) == ["learning_rate", "lora.r"]
    assert sum(found.values()) == pytest.approx(1)
    assert found["learning_rate"] > 0.7
    assert importances(tmp_path) == found
    figure = importance_bars(collect(write_sweep(tmp_path, [believable(["lora.r=4"])])))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["lora.r", "learning_rate"]


def test_of_a_few_trials_or_none_nothing_is_said(tmp_path):
    assert importances(tmp_path) == {}
    study_in(tmp_path, 9)
    assert importances(tmp_path) == {}
