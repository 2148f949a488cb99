"""Whose turn it is: jobs of one process run up to where they hand something in, and what they hand in is done at once.

Every job that is live has handed in a batch, or waits at a rung of successive halving, whenever the conductor acts.
Batches of validations are scored first, so that jobs that validate at other times meet again; then one batch of every
job that trains.
"""

from __future__ import annotations

import functools
import gc
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterError, LoraConfigError
from lora_lightning.sweeps.packed.baton import Player, without_frames
from lora_lightning.sweeps.packed.halving import Board, Place
from lora_lightning.sweeps.packed.requests import AtRung, Score


class Together(Protocol):
    """What scores the batches of several jobs at once; see ``PackedModel``."""

    def seat(self, models: Sequence[nn.Module]) -> None:
        """Take models in, in the order of their slots, and let others go."""

    def losses(
        self,
        batches: Mapping[int, Mapping[str, Tensor]],
        *,
        train: bool,
        drawing: Callable[[int], AbstractContextManager[None]],
    ) -> dict[int, Any]:
        """Score a batch each of some slots, all of them in training."""


class Conductor:
    """Runs jobs in one process.

    Args:
        model: Scores what several of them hand in.
        places: How many jobs there may be at once; the others wait until one ends.
        board: Of successive halving, if there is such.
        why_alone: Says of a model why it cannot be scored with others, or None. Its job then scores by itself.
    """

    def __init__(
        self,
        model: Together,
        *,
        places: int,
        board: Board | None = None,
        why_alone: Callable[[nn.Module], str | None] = lambda model: None,
    ) -> None:
        self._model, self._places, self._board, self._why_alone = model, places, board, why_alone
        self._live: list[Player] = []
        self._seats: list[Player] = []
        self._known: set[Player] = set()
        self._alone: set[Player] = set()
        self._cohort: dict[Player, int] = {}
        self._told: set[str] = set()
        self._most = places  # batches that are scored at once
        self._signal = 0

    def run(self, players: Sequence[Player]) -> None:
        """Run all jobs to their ends; how each has ended is told by its player.

        Args:
            players: Not yet begun. Their results do not depend on their order, which is that in which they get places.
        """
        waiting, cohort = deque(players), 0
        while waiting or self._live:
            self._fill(waiting, cohort)
            if self._live:
                self._serve()
            self._live = [player for player in self._live if not player.ended]
            cohort += 1
        self._take_seats([])

    def stop(self, number: int) -> None:
        """Let all jobs save and end at their next step, and start no further ones; may be called within a signal."""
        self._signal = number
        for player in self._live:
            player.signal = number

    def _fill(self, waiting: deque[Player], cohort: int) -> None:
        """Give free places to waiting jobs, each of which runs up to the first thing that it hands in."""
        while waiting and len(self._live) < self._places:
            player = waiting.popleft()
            if self._signal:
                continue
            if any(each.ended for each in self._cohort):
                gc.collect()  # a training knows itself in circles, and the next one is to find its memory free
            self._cohort[player] = cohort
            player.play()
            if not player.ended:
                self._live.append(player)
                player.signal = self._signal
        self._live.sort(key=lambda player: player.number)

    def _serve(self) -> None:
        if self._decide():
            return
        scoring = [player for player in self._live if isinstance(player.request, Score)]
        validating = [player for player in scoring if not player.request.train]
        asked = validating or scoring
        answers = self._answers(asked, scoring)
        for player in asked:
            player.beside = max(player.beside, len(self._live) - 1)
            player.play(answers.pop(player, None))

    # ---- scoring

    def _answers(self, asked: list[Player], scoring: list[Player]) -> dict[Player, Any]:
        """The losses of those that are scored together; of the others nothing: they are to do it themselves."""
        able = [player for player in scoring if not self._is_alone(player)]
        together = [player for player in asked if player in able]
        failed = self._attempt(together, lambda: self._take_seats(able))
        together = [player for player in together if player in self._seats]
        train = asked[0].request.train
        sizes = sorted({player.request.rows for player in together})
        if train and len(sizes) > 1:  # an epoch's last batch is smaller, and epochs end at different steps
            return {}
        answers = failed
        for rows in sizes:
            alike = [player for player in together if player.request.rows == rows]
            answers |= self._together(alike, train)
        return answers

    def _together(self, alike: list[Player], train: bool) -> dict[Player, Any]:
        """Score batches of one size in as few parts as memory lets; one that is left over scores by itself."""
        most = self._most
        answers: dict[Player, Any] = {}
        for part in (alike[place : place + most] for place in range(0, len(alike), most)):
            if len(part) > 1:
                answers |= self._attempt(part, functools.partial(self._scored, part, train))
        if self._most < most:  # it was too much: what has been answered stays
            answers |= self._together([player for player in alike if player not in answers], train)
        return answers

    def _attempt(self, players: list[Player], do: Callable[[], dict[Player, Any]]) -> dict[Player, Any]:
        """Do something for several jobs at once: their answers, or none where it is refused and each does it itself."""
        drawn = [player.context.drawn() for player in players]
        try:
            return do()
        except LoraConfigError as error:  # what does not go together goes by itself, and who is wrong fails alone
            for player, states in zip(players, drawn, strict=True):
                player.context.draw_again(states)
            self._tell(f"Not scored together: {error}")
            return {}
        except torch.OutOfMemoryError as error:
            for player, states in zip(players, drawn, strict=True):
                player.context.draw_again(states)
            self._most = max(1, min(self._most, len(players)) // 2)
            without_frames(error)  # they hold what there was too much of
            self._tell(f"A step of {len(players)} jobs does not fit into memory: from now on {self._most} at once")
            return {}
        except Exception as error:  # it is for each job's Trainer to end the job
            traceback.print_exc()
            return {player: _failed(players, error) for player in players}

    def _scored(self, players: list[Player], train: bool) -> dict[Player, Any]:
        slots = {self._seats.index(player): player for player in players}
        device = players[0].request.device
        with players[0].context.computing(), players[0].request.as_handed_in():
            losses = self._model.losses(
                {slot: player.request.batch for slot, player in slots.items()},
                train=train,
                drawing=lambda slot: self._seats[slot].context.drawing(device),
            )
        return {player: losses[slot] for slot, player in slots.items()}

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            print(message, flush=True)

    def _is_alone(self, player: Player) -> bool:
        if player not in self._known:
            self._known.add(player)
            if (reason := self._why_alone(player.request.model)) is not None:
                self._alone.add(player)
                with player.context:
                    print(f"This job is not trained together with others: {reason}.")
        return player in self._alone

    def _take_seats(self, players: list[Player]) -> dict[Player, Any]:
        """Seat the jobs that score now: those at a rung stand aside, and a single one does better by itself."""
        players = players if min(len(players), self._most) > 1 else []
        if players != self._seats:
            self._seats = []
            self._model.seat([player.request.model for player in players])
            self._seats = players
        return {}

    # ---- halving

    def _decide(self) -> bool:
        """Where all of a cohort wait at a rung, say who goes on; whether there was such a cohort.

        Of jobs that wait at different rungs those at the lowest are told, and may come to the next.
        """
        for cohort in sorted({self._cohort[player] for player in self._live}):
            members = [player for player in self._live if self._cohort[player] == cohort]
            if not all(isinstance(player.request, AtRung) for player in members):
                continue
            rung = min(player.request.rung for player in members)
            here = [player for player in members if player.request.rung == rung]
            places = self._places_at(rung, here)
            for player in here:
                player.play(None if self._signal else places[player])
            return True
        return False

    def _places_at(self, rung: int, players: list[Player]) -> dict[Player, Place]:
        if self._board is None:
            raise RuntimeError("a job waits at a rung, and there is no halving")
        for player in players:
            self._board.report(rung, player.number, player.request.value)
        return {player: self._board.place(rung, player.number) for player in players}


def _failed(players: list[Player], error: Exception) -> AdapterError:
    numbers = ", ".join(str(player.number) for player in players)
    failed = AdapterError(f"The step of jobs {numbers} together has failed: {type(error).__name__}: {error}")
    failed.__cause__ = without_frames(error)  # they hold the step's activations
    return failed
