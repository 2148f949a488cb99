"""Stands between a sweep and a job: starts the job, and sees to it that nothing of it outlives its time.

Run as a file, in a session of its own: ``python guard.py LOCKS PATIENCE COMMAND…``, with a pipe from the sweep as its
standard input. It hands on what the sweep writes there, one letter each, and takes the pipe's end for the sweep's own
end, however that came about:

======  ==============================================================================================================
I, T    the job's first process gets SIGINT or SIGTERM, so that it can save; it passes it on to its own as it sees fit
        (a data worker that got it as well would be missed at the next batch). After ``PATIENCE`` seconds, SIGTERM to
        all that is left, and then SIGKILL.
K       SIGKILL to all at once.
(end)   as T.
======  ==============================================================================================================

Processes whose parents have ended become the guard's children (on Linux), those that left the session too, so that it
knows them all. What is left a while after the job's first process has ended (a rank that waits for one that failed) is
ended as well. Until all are gone the guard holds the locks (file descriptors, separated by commas) of the job's folder.
Its exit status, or the signal that it ends by, is the job's.

It imports next to nothing, since there is one for each job.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time

LINGER = 10.0  # seconds that the others of a job have once its first process has ended
LAST = 5.0  # seconds between SIGTERM and SIGKILL to all
_SUBREAPER, _DEATH_SIGNAL = 36, 1  # of Linux's prctl
_ASKED = {b"I": signal.SIGINT, b"T": signal.SIGTERM, b"K": signal.SIGKILL, b"": signal.SIGTERM}
_NOTED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """Start the job and stay until all of it has ended."""
    locks, patience, command = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
    for descriptor in filter(None, locks.split(",")):
        os.set_inheritable(int(descriptor), False)  # held by the guard, who outlives them all
    _prctl(_SUBREAPER, 1)
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGCHLD, *_NOTED):
        signal.signal(number, lambda *_: None)  # they arrive by way of the pipe
    status = _guard(_start(command), patience, woken)
    _end_alike(status)


def _guard(job: int, patience: float, woken: int) -> int:
    """Wait for the job and all that came of it; returns the job's status as ``os.wait`` gives it."""
    status: int | None = None
    listening, stopping, killing = [0, woken], False, False
    due: list[tuple[float, int]] = []  # what is still to be done, and when
    while True:
        left = None if not due else max(0.0, due[0][0] - time.monotonic())
        ready = select.select(listening, [], [], left)[0]
        asked = []
        if woken in ready:
            asked += [number for number in os.read(woken, 512) if number in _NOTED]
        if 0 in ready:
            letter = os.read(0, 1)
            if not letter:
                listening.remove(0)
            asked.append(_ASKED.get(letter, signal.SIGTERM))
        now = time.monotonic()
        if signal.SIGKILL in asked:
            due, killing = [(now, signal.SIGKILL)], True
        elif asked and not stopping and status is None:
            _send(job, asked[0])
            stopping, due = True, [(now + patience, signal.SIGTERM), (now + patience + LAST, signal.SIGKILL)]
        if due and due[0][0] <= now:
            number = due.pop(0)[1]
            _send_all(job, number)
            if number == signal.SIGKILL:
                due = [(now + 0.2, number)]  # again, for one that was just being born
        ended, any_left = _ended()
        if job in ended:
            status = ended[job]
            if not killing:
                due = [(now + LINGER, signal.SIGTERM), (now + LINGER + LAST, signal.SIGKILL)]
        if not any_left:
            return status or 0


def _start(command: list[str]) -> int:
    guard = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _NOTED)  # one for the job waits until the job can have it
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOTED)
        return pid
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, *_NOTED):
            signal.signal(number, signal.SIG_DFL)  # whatever the sweep's own are: one in the background ignores Ctrl-C
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOTED)
        _prctl(_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != guard:  # it ended in between
            os._exit(1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]} could not be started: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _ended() -> tuple[dict[int, int], bool]:
    """The statuses of children that have ended, and whether any are left."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended, False
        if pid == 0:
            return ended, True
        ended[pid] = status


def _send_all(job: int, number: int) -> None:
    """Send a signal to all that came of the job; where there is no ``/proc``, to the job's own group."""
    if not os.path.isdir("/proc/self"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(job, number)
    for pid in _tree():
        _send(pid, number)


def _tree() -> list[int]:
    """All processes below this one."""
    parents = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
                parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    found, new = [], {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new}
        found += sorted(new)
    return found


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def _end_alike(status: int) -> None:
    """End as the job did, so that the sweep sees its status or its signal."""
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # that of SIGKILL cannot be set
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
