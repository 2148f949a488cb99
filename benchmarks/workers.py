"""An object that lives in a process of its own, so that nobody's allocator, threads or patches touch another's.

Workers wait for the one that is measured: turns of several processes interleave as in one.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from typing import Any

_PATIENCE = 20.0  # seconds


class Worker:
    """Makes an object in a fresh process and calls its methods from here.

    Args:
        make: A class or function at the top of a module.
        *args: What it is given; both are pickled.
    """

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit this process's memory
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self._process.start()
        theirs.close()
        self._ready = False

    def call(self, method: str, *args: Any) -> Any:
        """What a method returns; waits for the object to be made.

        Raises:
            RuntimeError: It failed there, with that process's traceback.
        """
        if not self._ready:
            self._receive()
            self._ready = True
        self._pipe.send((method, args))
        return self._receive()

    def _receive(self) -> Any:
        try:
            good, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a worker ended with status {self._process.exitcode} (-9: out of memory)") from None
        if not good:
            raise RuntimeError(f"a worker failed:\n{value}")
        return value

    def close(self) -> None:
        """End the process: it hears of it where it waits for its turn, and puts away what it has."""
        self._pipe.close()
        self._process.join(_PATIENCE)
        self._process.kill()
        self._process.join()


class Local:
    """The same in this process: quick, and figures that mean nothing."""

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        self._object = make(*args)

    def call(self, method: str, *args: Any) -> Any:
        """What a method returns."""
        return getattr(self._object, method)(*args)

    def close(self) -> None:
        """Let go of the object."""
        self._object = None


def _serve(pipe: Any, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        made = make(*args)
        if hasattr(made, "serve"):  # it has a loop of its own, which asks the pipe for its turns
            made.serve(pipe)
        pipe.send((True, None))
        while True:
            method, arguments = pipe.recv()
            pipe.send((True, getattr(made, method)(*arguments)))
    except (EOFError, BrokenPipeError):  # whoever started this is gone
        return
    except BaseException:
        pipe.send((False, traceback.format_exc()))
