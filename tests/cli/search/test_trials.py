"""The study of a search, asked and told without jobs."""

from __future__ import annotations

import math

import pytest

from lora_lightning.cli.search.options import Options
from lora_lightning.cli.search.space import parse_space
from lora_lightning.cli.search.trials import JOB, TWIN, Trials
from lora_lightning.errors import LoraConfigError
from lora_lightning.sweeps.study import NOTE, PRUNED, Note

optuna = pytest.importorskip("optuna")
SPACE = parse_space(["x=interval(-5,5)", "y=tag(log,interval(1e-6,1))"])
SMALL = parse_space(["x=1,2,3", "y=a,b"])


def loss(x, y):
    return (x - 2) ** 2 + (math.log10(y) + 3) ** 2


def best_of(folder, **options):
    trials = Trials(folder, SPACE, Options(**options))
    while jobs := trials.ask(4):
        for trial in jobs.values():
            trials.tell(trial.number, loss(**trial.params))
    return trials.best()[0].value


def test_tpe_finds_more_than_chance(tmp_path):
    found = [best_of(tmp_path / f"tpe{seed}", n_trials=30, seed=seed) for seed in range(3)]
    by_chance = [best_of(tmp_path / f"random{seed}", n_trials=30, seed=seed, sampler="random") for seed in range(3)]
    assert sum(found) < sum(by_chance)


@pytest.mark.parametrize(
    "sampler", ["tpe", "random", "grid", {"_target_": "optuna.samplers.NSGAIISampler", "population_size": 2}]
)
def test_a_study_opened_again_draws_what_it_would_have_drawn(tmp_path, sampler):
    options = Options(n_trials=6, sampler=sampler, seed=3)
    drawn = {}
    for name, opened in (("once", [6]), ("again", [2, 4, 6])):
        for until in opened:
            trials = Trials(tmp_path / name, SMALL, options)
            while len(trials.all()) < until:
                for trial in trials.ask(2).values():
                    trials.tell(trial.number, float(trial.params["x"]))
        drawn[name] = [trial.params for trial in trials.all()]
    assert drawn["once"] == drawn["again"]
    other = Trials(tmp_path / "other", SMALL, Options(n_trials=6, sampler=sampler, seed=4))
    while jobs := other.ask(2):
        for trial in jobs.values():
            other.tell(trial.number, float(trial.params["x"]))
    assert [trial.params for trial in other.all()] != drawn["once"]


def test_a_grid_has_each_combination_once(tmp_path):
    trials = Trials(tmp_path, SMALL, Options(n_trials=100, sampler="grid"))
    while jobs := trials.ask(4):
        for trial in jobs.values():
            trials.tell(trial.number, 1.0)
    assert {(trial.params["x"], trial.params["y"]) for trial in trials.all()} == {(x, y) for x in "123" for y in "ab"}
    assert len(trials.all()) == 6


def test_jobs_are_numbered_through_and_repeats_share_what_came_of_the_first(tmp_path):
    space = parse_space(["x=1,2", "y=0,1,2,3,4,5,6,7,8,9"])
    trials = Trials(tmp_path, space, Options(n_trials=60, sampler="random"))
    ran = {}
    while jobs := trials.ask(7):
        for job, trial in jobs.items():
            assert ran.setdefault(job, trial.params) is trial.params
            if trial.params["x"] == "2":
                trials.study._storage.set_trial_intermediate_value(trial._trial_id, 5, float(trial.params["y"]))
                trials.study._storage.set_trial_user_attr(trial._trial_id, PRUNED, 5)
            trials.tell(trial.number, float(trial.params["y"]))
    assert list(ran) == list(range(len(ran)))
    assert len({tuple(params.items()) for params in ran.values()}) == len(ran) < len(trials.all()) <= 60
    for trial in trials.all():
        assert trial.state.name == {"1": "COMPLETE", "2": "PRUNED"}[trial.params["x"]]
        assert trial.value == float(trial.params["y"])
        assert (JOB in trial.user_attrs) is (TWIN not in trial.user_attrs)


def test_a_repeat_of_what_has_failed_fails(tmp_path):
    trials = Trials(tmp_path, parse_space(["x=1,2,3"]), Options(n_trials=20, sampler="random"))
    while jobs := trials.ask(2):
        for trial in jobs.values():
            trials.fail(trial.number, "no memory left")
    assert {trial.state.name for trial in trials.all()} == {"FAIL"}
    for trial in trials.all():
        twin = trial.user_attrs.get(TWIN)
        why = "no memory left" if twin is None else f"it repeats trial {twin}, which failed"
        assert trial.user_attrs["failed"] == why
    assert 3 < len(trials.all()) < 20


def test_what_was_running_is_found_again(tmp_path):
    trials = Trials(tmp_path, SPACE, Options(n_trials=6))
    jobs = trials.ask(3)
    trials.tell(jobs[1].number, 1.0)
    trials.study.ask()  # ended while a trial was being drawn
    again = Trials(tmp_path, SPACE, Options(n_trials=6))
    left = again.left_running()
    assert {job: trial.params for job, trial in left.items()} == {job: jobs[job].params for job in (0, 2)}
    assert [trial.state.name for trial in again.all()] == ["RUNNING", "COMPLETE", "RUNNING", "FAIL"]
    for trial in left.values():
        again.tell(trial.number, 2.0)
    assert list(again.ask(5)) == [3, 4]


@pytest.mark.parametrize("changed", [{"space": SMALL}, {"options": Options(direction="max")}])
def test_a_study_of_something_else_is_refused(tmp_path, changed):
    Trials(tmp_path, SPACE, Options())
    with pytest.raises(LoraConfigError, match="another search"):
        Trials(tmp_path, changed.get("space", SPACE), changed.get("options", Options()))
    Trials(tmp_path, SPACE, Options(n_trials=100, sampler="random", seed=5))  # how it goes on may change
    Trials(tmp_path, SPACE._replace(fixed=("sweep.jobs_per_device=2",)), Options())  # and where its jobs run


def test_a_line_broken_off_is_taken_away(tmp_path):
    trials = Trials(tmp_path, SPACE, Options())
    trials.ask(2)
    journal = tmp_path / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":5,"work')
    again = Trials(tmp_path, SPACE, Options())
    assert journal.read_bytes().startswith(whole)
    assert [trial.params for trial in again.all()] == [trial.params for trial in trials.all()]
    again.ask(2)
    assert len(Trials(tmp_path, SPACE, Options()).all()) == 4


def test_the_note_of_a_trial(tmp_path):
    trials = Trials(tmp_path, SPACE, Options())
    note = trials.note(3, "val_loss", {"_target_": "optuna.pruners.NopPruner"})
    assert Note.read(tmp_path / "job") is None
    note.write(tmp_path / "job")
    assert Note.read(tmp_path / "job") == note
    Note.remove(tmp_path / "job")
    assert not (tmp_path / "job").exists()
    note.write(tmp_path / "other")
    (tmp_path / "other" / "result.json").touch()
    Note.remove(tmp_path / "other")
    assert [each.name for each in (tmp_path / "other").iterdir()] == ["result.json"]
    assert not (tmp_path / "other" / NOTE).exists()
