"""Who is when at it. Batches are scored one by one here, so that only the order of things is looked at."""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext

import pytest
import torch

from lora_lightning.errors import AdapterError, LoraConfigError
from lora_lightning.sweeps.packed.baton import Player
from lora_lightning.sweeps.packed.conductor import Conductor
from lora_lightning.sweeps.packed.context import Context
from lora_lightning.sweeps.packed.halving import Board, Place
from lora_lightning.sweeps.packed.model import SlotLoss
from lora_lightning.sweeps.packed.requests import AtRung, Score
from lora_lightning.tasks.loss import causal_lm_loss
from tests.sweeps.packed.solo import Twins, batch, by_name, tiny_llama


class OneByOne:
    """Stands in for a PackedModel: every slot's batch goes through its own model by itself."""

    def __init__(self, failure=None, most=None):
        self.seats, self.calls, self.failure, self.most = [], [], failure, most

    def seat(self, models):
        self.seats = list(models)

    def losses(self, batches, *, train, drawing):
        self.calls.append((tuple(sorted(batches)), train))
        if self.failure is not None:
            raise self.failure
        if self.most is not None:
            found = {slot: self._loss(slot, batches[slot], train, drawing) for slot in batches}
            if len(batches) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return found
        assert not train or len(batches) == len(self.seats)
        return {slot: self._loss(slot, batches[slot], train, drawing) for slot in batches}

    def _loss(self, slot, batch, train, drawing):
        model = self.seats[slot].train(train)
        with torch.set_grad_enabled(train), drawing(slot) if train else nullcontext():
            total, terms = causal_lm_loss(model, batch)[:2]
            trained = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(total, trained) if train else []
        return SlotLoss(total.detach(), terms, list(zip(trained, gradients, strict=False)))


@pytest.fixture(scope="module")
def twins():
    return Twins(tiny_llama(), [{"r": 4, "lora_dropout": 0.2}, {"r": 2}, {"r": 8, "lora_dropout": 0.1}])


def players(*works):
    return [Player(number, work, Context()) for number, work in enumerate(works)]


def plan(model, steps, *, log=None, rows=2):
    """A job that validates before and after its steps, as ``"v"``, and trains, as ``"t"``."""

    def work(player):
        for number, kind in enumerate(steps):
            with torch.set_grad_enabled(kind == "t"):
                size = rows[number] if isinstance(rows, list) else rows
                answer = player.hand_in(Score(model, batch(size, 5, number), kind == "t"))
            if log is not None:
                log.append((player.number, kind, None if answer is None else float(answer.total)))

    return work


def test_losses_gradients_and_draws_are_those_of_each_job_alone(twins):
    found = {}

    def job(slot):
        def work(player):
            torch.set_rng_state(twins.states[slot])
            for step in range(3):
                answer = player.hand_in(Score(twins.shells[slot], batch(2, 5 + slot, 10 * slot + step), True))
                found[slot, step] = answer.total, by_name(twins.shells[slot], answer.gradients)
                torch.rand(())  # of the job's own

        return work

    Conductor(OneByOne(), places=3).run(players(*map(job, range(3))))
    for slot in range(3):
        for step in range(3):
            total, _, grads = twins.alone(slot, batch(2, 5 + slot, 10 * slot + step))
            torch.set_rng_state(twins.states[slot])
            torch.rand(())
            twins.states[slot] = torch.get_rng_state()
            assert found[slot, step][0] == total
            for name, grad in grads.items():
                torch.testing.assert_close(found[slot, step][1][name], grad, rtol=0, atol=0)


def test_one_thread_runs_at_a_time_and_places_are_bounded(twins):
    running, most, live, crowd = [], [], set(), []

    def work(player):
        live.add(player.number)
        for step in range(3 + player.number):
            running.append(threading.current_thread())
            most.append(len(running))
            crowd.append(len(live))
            running.pop()
            player.hand_in(Score(twins.shells[player.number % 3], batch(2, 4, step), True))
        live.remove(player.number)

    model = OneByOne()
    jobs = players(*[work] * 7)
    Conductor(model, places=3).run(jobs)
    assert set(most) == {1}
    assert max(crowd) == 3
    assert all(job.ended and job.error is None for job in jobs)
    assert not live
    assert model.seats == []  # nothing keeps what has ended


def test_validations_come_first_and_all_train_together(twins):
    model, log = OneByOne(), []
    Conductor(model, places=3).run(
        players(
            plan(twins.shells[0], "vvttvt", log=log),
            plan(twins.shells[1], "vtttt", log=log),
            plan(twins.shells[2], "ttt", log=log),
        )
    )
    assert [slots for slots, train in model.calls if train] == [(0, 1, 2)] * 3
    assert model.calls[0] == ((0, 1), False)  # both at once
    first = next(at for at, (_, kind, _) in enumerate(log) if kind == "t")
    assert sorted(number for number, kind, _ in log[:first]) == [0, 0, 1]


def test_a_single_job_scores_by_itself(twins):
    model, log = OneByOne(), []
    Conductor(model, places=2).run(
        players(plan(twins.shells[0], "tttt", log=log), plan(twins.shells[1], "tt", log=log))
    )
    alone = [number for number, _, total in log if total is None]
    assert alone == [0, 0]
    assert len(model.calls) == 2


def test_batches_of_different_sizes_are_scored_each_by_itself_in_training(twins):
    model, log = OneByOne(), []
    Conductor(model, places=2).run(
        players(
            plan(twins.shells[0], "ttv", log=log, rows=[2, 1, 2]),
            plan(twins.shells[1], "ttv", log=log, rows=[2, 2, 1]),
        )
    )
    assert model.calls == [((0, 1), True)]
    assert [total is None for _, _, total in log] == [False] * 2 + [True] * 4


def test_a_job_that_cannot_be_scored_with_others_scores_itself(twins, capsys):
    model, log = OneByOne(), []
    refused = twins.shells[1]
    jobs = players(*(plan(shell, "tt", log=log) for shell in twins.shells))
    Conductor(model, places=3, why_alone=lambda shell: "it has a head of its own" if shell is refused else None).run(
        jobs
    )
    assert model.calls == [((0, 1), True)] * 2
    assert [total is None for number, _, total in log if number == 1] == [True, True]
    assert capsys.readouterr().out.count("it has a head of its own") == 1


def test_a_job_that_fails_ends_alone(twins):
    log = []

    def fails(player):
        player.hand_in(Score(twins.shells[1], batch(2, 4, 0), True))
        raise ValueError("no luck")

    jobs = players(plan(twins.shells[0], "ttt", log=log), fails, plan(twins.shells[2], "ttt", log=log))
    Conductor(OneByOne(), places=3).run(jobs)
    assert [type(job.error) for job in jobs] == [type(None), ValueError, type(None)]
    assert [number for number, _, _ in log] == [0, 2] * 3


def test_a_step_that_fails_is_each_jobs_own_error_and_waiting_jobs_begin(twins):
    model = OneByOne(MemoryError("too much"))
    jobs = players(*[plan(shell, "t") for shell in twins.shells])
    Conductor(model, places=2).run(jobs)
    assert [type(job.error) for job in jobs] == [AdapterError, AdapterError, type(None)]
    assert jobs[0].error is not jobs[1].error
    assert "step of jobs 0, 1 together has failed: MemoryError: too much" in str(jobs[0].error)


def test_batches_that_do_not_go_together_are_scored_each_by_itself(twins, capsys):
    log = []
    model = OneByOne(LoraConfigError("keys differ"))
    Conductor(model, places=2).run(players(*(plan(shell, "tt", log=log) for shell in twins.shells[:2])))
    assert [total for _, _, total in log] == [None] * 4
    assert capsys.readouterr().out.count("keys differ") == 1


def test_a_signal_reaches_all_live_jobs_and_no_more_begin(twins):
    seen = []

    def work(player):
        while not player.signal:
            player.hand_in(Score(twins.shells[player.number], batch(2, 4, 0), True))
            if player.number == 1:
                conductor.stop(15)
        seen.append((player.number, player.signal))

    jobs = players(work, work, work)
    conductor = Conductor(OneByOne(), places=2)
    conductor.run(jobs)
    assert seen == [(1, 15), (0, 15)]
    assert not jobs[2].ended


def test_who_waits_at_a_rung_is_passed_over_until_its_cohort_has_come(twins):
    told = {}

    def climbing(steps, value):
        def work(player):
            plan(twins.shells[player.number % 3], "t" * steps)(player)
            told[player.number] = player.hand_in(AtRung(0, value))
            if told[player.number].stays:
                plan(twins.shells[player.number % 3], "tt")(player)

        return work

    values = [3.0, 1.0, 2.0, 2.5]
    jobs = players(*(climbing(steps, value) for steps, value in zip((1, 3, 2, 1), values, strict=True)))
    Conductor(OneByOne(), places=3, board=Board(2, "min")).run(jobs)
    assert all(job.error is None for job in jobs)
    assert told == {
        0: Place(3, 3, False),
        1: Place(1, 3, True),
        2: Place(2, 3, True),
        3: Place(3, 4, False),  # it had the place of job 0
    }


def test_a_job_that_ends_before_a_rung_keeps_nobody_waiting(twins):
    def early(player):
        plan(twins.shells[0], "t")(player)

    def climbing(player):
        plan(twins.shells[1], "tt")(player)
        assert player.hand_in(AtRung(0, 1.0)) == Place(1, 1, True)

    jobs = players(early, climbing)
    Conductor(OneByOne(), places=2, board=Board(2, "min")).run(jobs)
    assert [job.error for job in jobs] == [None, None]


class Large:
    """What a job has in memory; its parts know each other, as those of a Trainer do."""

    def __init__(self):
        self.itself = self


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_job_has_in_memory_is_gone_before_the_next_begins(twins, fails):
    left, seen = [], []

    def first(player):
        large = Large()
        left.append(weakref.ref(large))
        plan(twins.shells[0], "t")(player)
        if fails:
            try:
                raise ValueError("no luck")
            except ValueError:
                raise RuntimeError("none at all") from None

    def second(player):
        seen.append(left[0]())

    jobs = players(first, second)
    Conductor(OneByOne(), places=1).run(jobs)
    assert seen == [None]
    assert (jobs[0].error is not None) == fails


@pytest.mark.parametrize(
    ("error", "ends_with"), [(LoraConfigError("of another base"), type(None)), (MemoryError("too much"), AdapterError)]
)
def test_where_no_seats_can_be_taken_jobs_end_or_go_on_by_themselves(twins, capsys, error, ends_with):
    class Unwilling(OneByOne):
        def seat(self, models):
            super().seat([])
            if models:
                raise error

    log = []
    jobs = players(*(plan(shell, "t", log=log) for shell in twins.shells[:2]))
    Conductor(Unwilling(), places=2).run(jobs)
    assert [type(job.error) for job in jobs] == [ends_with] * 2
    assert log == ([(0, "t", None), (1, "t", None)] if ends_with is type(None) else [])
    assert str(error) in "".join(capsys.readouterr())


def test_what_was_drawn_for_a_step_that_is_refused_is_drawn_again(twins):
    class Refusing(OneByOne):
        def losses(self, batches, *, train, drawing):
            super().losses(batches, train=train, drawing=drawing)
            raise LoraConfigError("tokens are picked out")

    found = []

    def work(player):
        torch.manual_seed(3)
        player.hand_in(Score(twins.shells[0], batch(2, 4, 0), True))
        found.append(torch.rand(()).item())

    Conductor(Refusing(), places=2).run(players(work, work))
    torch.manual_seed(3)
    assert found == [torch.rand(()).item()] * 2


@pytest.mark.parametrize(("jobs", "fit", "sizes"), [(3, 1, [3]), (5, 2, [5, 2, 2, 2, 2])])
def test_jobs_that_do_not_fit_into_memory_together_are_scored_in_parts(jobs, fit, sizes, capsys):
    """What was drawn for the attempt is drawn again, and later steps ask for no more than has fitted."""
    twins, found = Twins(tiny_llama(), [{"r": 2 + slot, "lora_dropout": 0.2} for slot in range(jobs)]), {}

    def job(slot):
        def work(player):
            torch.set_rng_state(twins.states[slot])
            for step in range(2):
                rows = batch(2, 5, 10 * slot + step)
                answer = player.hand_in(Score(twins.shells[slot], rows, True))
                answer = answer or causal_lm_loss(twins.shells[slot].train(), rows)
                found[slot, step] = float(answer.total.detach())

        return work

    model = OneByOne(most=fit)
    Conductor(model, places=jobs).run(players(*map(job, range(jobs))))
    assert [len(slots) for slots, _ in model.calls] == sizes
    assert f"A step of {jobs} jobs does not fit into memory: from now on {fit} at once" in capsys.readouterr().out
    for slot in range(jobs):
        for step in range(2):
            total, _, _ = twins.alone(slot, batch(2, 5, 10 * slot + step))
            assert found[slot, step] == pytest.approx(float(total), abs=1e-12)
