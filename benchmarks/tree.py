"""The memory of a process and all that it has started, sampled while they run. Linux only."""

from __future__ import annotations

import threading
import time
from typing import Any

import psutil

EVERY = 0.5  # seconds; longer where looking takes more than a twentieth of that


class TreeMemory:
    """Watches a process and its children in a thread, while the block runs.

    Args:
        pid: The process.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._most = {"pss": 0, "rss": 0, "processes": 0}
        self._samples = 0

    def __enter__(self) -> TreeMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def told(self) -> dict[str, Any]:
        """The largest sums met, in bytes: ``pss`` (shared pages once), ``rss``; most ``processes``; ``samples``."""
        return {**self._most, "samples": self._samples}

    def _watch(self) -> None:
        while not self._done.is_set():
            begin = time.perf_counter()
            self._look()
            self._done.wait(max(EVERY, 20 * (time.perf_counter() - begin)))

    def _look(self) -> None:
        sums = {"pss": 0, "rss": 0, "processes": 0}
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                memory = process.memory_full_info()
            except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended meanwhile
                continue
            sums = {
                "pss": sums["pss"] + memory.pss,
                "rss": sums["rss"] + memory.rss,
                "processes": sums["processes"] + 1,
            }
        self._most = {key: max(value, sums[key]) for key, value in self._most.items()}
        self._samples += 1
