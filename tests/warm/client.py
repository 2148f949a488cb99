"""Stands for a process of the server while that lives: ``python -IS client.py <socket> <program> <arguments>``.

The program is what starts this; it is ``sys.executable`` in the process, so that those that it starts are warm too.
"""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    place, program, *arguments = sys.argv[1:]
    if arguments[0].startswith("-") and arguments[0] not in ("-c", "-m"):  # options of the interpreter
        os.execv(sys.executable, [sys.executable, *arguments])
    request = {
        "program": program,
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(place)
    text = json.dumps(request).encode() + b"\n"
    connection.sendall(text[socket.send_fds(connection, [text], [0, 1, 2]) :])
    answers = connection.makefile()
    pid = int(answers.readline())
    for each in FORWARDED:
        signal.signal(each, lambda number, _: os.kill(pid, number))
    status = int(answers.readline())
    if status < 0:  # end as it ended
        if -status in FORWARDED:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()
