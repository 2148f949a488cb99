"""Imports once, then forks a process for each client: ``python server.py <socket>``, until its input ends.

What the imports of torch, Lightning and transformers cost is six seconds of work a process, more than most tests. The
processes forked here are real ones: their own environment, folder, streams, signals, ``__main__`` and exit with all
its hooks; ``lora_lightning`` they import themselves. They share what the server started with: what the libraries read
from the environment as they were imported (OMP_NUM_THREADS, HF_HOME …), and the seed of ``hash``. Each has a session
of its own, and stands below this server. A test of any of that, or of imports, wants the real Python.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import types
from pathlib import Path

IMPORTS = (
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint.state_dict",
    "lightning.pytorch",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto",
    "hydra",
    "peft",
    "matplotlib.pyplot",
)


def serve(place: str) -> tuple[dict, list[int]]:
    """Fork for each client that comes; returns in a forked process only, with what its client asked for."""
    base = [each for each in sys.path[1:] if each not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    for name in IMPORTS:
        importlib.import_module(name)
    tasks = Path("/proc/self/task")
    assert not tasks.exists() or len(list(tasks.iterdir())) == 1, "a process with threads is none to fork"
    gc.collect()
    gc.freeze()  # pages that nothing writes to stay shared
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(64)
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the test, whose end ends the input
    waiting = selectors.DefaultSelector()
    for each in (sys.stdin, listener, woken):
        waiting.register(each, selectors.EVENT_READ)
    print("ready", flush=True)
    running: dict[int, socket.socket] = {}
    while True:
        for event, _ in waiting.select():
            if event.fileobj is sys.stdin:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif event.fileobj is listener:
                connection, _ = listener.accept()
                text, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
                while not text.endswith(b"\n"):
                    text += connection.recv(1 << 20)
                if (pid := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    for each in (listener, woken, wake, connection, waiting, *running.values()):
                        each.close()
                    return {**json.loads(text), "path": base}, streams
                for stream in streams:
                    os.close(stream)
                running[pid] = connection
                waiting.register(connection, selectors.EVENT_READ, pid)
                say(connection, pid)
            elif event.fileobj is woken:
                woken.recv(1 << 10)
                while running and (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                    connection = running.pop(ended[0])
                    say(connection, os.waitstatus_to_exitcode(ended[1]))
                    with contextlib.suppress(KeyError):  # its client was killed
                        waiting.unregister(connection)
                    connection.close()
            elif event.data in running:  # a client says nothing more: it was killed, and so is what it stands for
                waiting.unregister(event.fileobj)
                os.kill(event.data, signal.SIGKILL)


def say(connection: socket.socket, number: int) -> None:
    """Tell a client a number, if it still lives."""
    with contextlib.suppress(OSError):
        connection.sendall(f"{number}\n".encode())


def become(request: dict, streams: list[int]) -> list[str]:
    """Be the process that the client stands for; gives the arguments of its Python."""
    os.setsid()  # a Ctrl-C reaches it through its client only
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.executable = request["program"]
    first, *arguments = request["arguments"]
    own = str(Path(first).resolve().parent) if not first.startswith("-") else ""
    told = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    sys.path[:] = [own, *told, *request["path"]]
    return [first, *arguments]


def run(first: str, *arguments: str) -> None:
    """Run ``-c code``, ``-m module`` or a file as ``__main__``."""
    if first == "-m":
        sys.argv = [*arguments]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    if first == "-c":
        sys.argv, source, name = ["-c", *arguments[1:]], arguments[0], "<string>"
    else:
        sys.argv, source, name = [first, *arguments], Path(first).read_text(encoding="utf-8"), first
        module.__file__ = name
    exec(compile(source, name, "exec", dont_inherit=True), vars(module))


if __name__ == "__main__":
    run(*become(*serve(sys.argv[1])))
