"""What a check is, what it finds, and how it is kept from hanging."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
        status: ``warning``: something does not work, or not well, that not everybody needs; ``failure``: training will
            not work.
        text: What was found, in a line.
        remedy: What to do about it; empty where there is nothing.
    """

    status: Status
    text: str
    remedy: str = ""


class Check(NamedTuple):
    """A question to the machine, which has an answer after some seconds or is given up.

    Attributes:
        name: What it is called.
        ask: The question.
        seconds: So long it may take.
        given_up: What it means that no answer came.
    """

    name: str
    ask: Callable[[], Finding]
    seconds: float
    given_up: Status = "failure"


def examine(check: Check) -> Finding:
    """Make a check. An error in it, and an answer that does not come, are findings too.

    A check that hangs goes on in a thread that nobody waits for; end the program with ``os._exit`` then.
    """
    found: list[Finding] = []

    def ask() -> None:
        try:
            found.append(check.ask())
        except Exception as error:  # whatever is wrong with a machine
            told = " ".join(str(error).split()) or "no message"
            found.append(Finding("failure", f"the check itself failed: {type(error).__name__}: {told[:300]}"))

    asking = threading.Thread(target=ask, name=check.name, daemon=True)
    asking.start()
    asking.join(check.seconds)
    if found:
        return found[0]
    return Finding(
        check.given_up, f"no answer within {check.seconds:g} seconds", "it hangs, or the machine is very busy"
    )


class Ran(NamedTuple):
    """How processes have ended: None where one had to be ended."""

    codes: list[int | None]
    outputs: list[str]
    errors: list[str]

    @property
    def last_words(self) -> str:
        """The last line of an error, of the first process that has one."""
        lines = [error.strip().splitlines()[-1] for error in self.errors if error.strip()]
        return lines[0][:300] if lines else "without a word"


def run_python(commands: Sequence[Sequence[str]], seconds: float, **environment: str) -> Ran:
    """Run Python side by side with each of these arguments, and leave no process behind."""
    # What tells a process that it is one of several is of somebody else's run.
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")
    clean = {key: value for key, value in os.environ.items() if key not in ranks}
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env=clean | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    codes: list[int | None] = []
    told: list[tuple[str, str]] = []
    try:
        for process in started:
            try:
                told.append(process.communicate(timeout=seconds))
                codes.append(process.returncode)
            except subprocess.TimeoutExpired:
                process.kill()
                told.append(process.communicate())
                codes.append(None)
    finally:
        for process in started:
            process.kill()
    return Ran(codes, [out for out, _ in told], [err for _, err in told])
