"""Threads of which exactly one runs at a time: whoever holds the baton.

Each job of a packed run is a whole training with a Trainer of its own, which knows nothing of the others. It runs in a
thread, up to where it hands something in and waits. Nothing runs beside it, so what it finds is what it has left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from lora_lightning.sweeps.packed.context import Context


class Player:
    """One job's thread: it runs while the conductor is in `play`, from one `hand_in` to the next.

    Args:
        number: The job's number; what is done for all jobs is done in the order of their numbers.
        work: The job, called in the thread with this player.
        context: What the job has for itself of what a process has once; in place while it runs.

    Attributes:
        request: What it has handed in last, and waits for an answer to.
        error: What the job has ended with, if that was an error.
        ended: Whether its thread has ended.
        signal: The signal on which it is to save and end, or 0.
        beside: How many other jobs there were at most while it ran.
    """

    def __init__(self, number: int, work: Callable[[Player], Any], context: Context) -> None:
        self.number, self.context = number, context
        self.request: Any = None
        self.error: BaseException | None = None
        self.ended = False
        self.signal = 0
        self.beside = 0
        self._work = work
        self._answer: Any = None
        self._mine, self._back = threading.Semaphore(0), threading.Semaphore(0)
        # A daemon: a process that has to end at once waits for no job.
        self._thread = threading.Thread(target=self._run, name=f"job {number}", daemon=True)

    def play(self, answer: Any = None) -> None:
        """Hand the baton over, with the answer to the last request, and wait until it comes back."""
        self.request, self._answer = None, answer
        with self.context:
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._mine.release()
            self._back.acquire()
        if self.ended:
            self._thread.join()

    def hand_in(self, request: Any) -> Any:
        """Called in the thread: hand the baton back, and wait for the answer.

        Raises:
            BaseException: The answer, where that is an error.
        """
        self.request = request
        self._back.release()
        self._mine.acquire()
        answer, self._answer = self._answer, None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def __deepcopy__(self, memo: dict[int, Any]) -> Player:
        return self  # of a copied task: it is the same job

    def _run(self) -> None:
        try:
            self._work(self)
        except BaseException as error:  # of whatever kind: it is this job's, and the others go on
            self.error = without_frames(error)
        finally:
            self.ended = True
            self._back.release()


def without_frames(error: BaseException) -> BaseException:
    """An error, and those that it came from, without the frames they went through.

    What those hold, a whole training or the activations of a step, would be in memory for as long as the error is.
    """
    seen: list[BaseException] = []
    ahead: list[BaseException | None] = [error]
    while ahead:
        each = ahead.pop()
        if each is not None and not any(each is other for other in seen):
            seen.append(each.with_traceback(None))
            ahead += [each.__cause__, each.__context__]
    return error
