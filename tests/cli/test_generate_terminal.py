"""`lora-lightning generate` at a real terminal."""

from __future__ import annotations

import codecs
import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from lora_lightning import LoraConfig, inject_lora, save_adapter
from lora_lightning.tasks import ModelConfig, load_model


class Terminal:
    """A process with a terminal of its own, and what it shows."""

    def __init__(self, *arguments):
        self.ours, theirs = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "lora_lightning.cli.generate", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        os.close(theirs)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end within a character
        self.shown = ""

    def type(self, text):
        os.write(self.ours, text.encode())

    def wait_for(self, text, seconds=120):
        """What was shown up to a text, which is read no second time."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, self.shown[-2000:]
            if select.select([self.ours], [], [], 0.2)[0]:
                self.shown += self.decoder.decode(os.read(self.ours, 65536))
        before, _, self.shown = self.shown.partition(text)
        return before

    def interrupt_until(self, text):
        """Ctrl-C, and again as a person would: Python loses one that comes just as it begins to wait for a line."""
        for _ in range(12):
            time.sleep(0.3)
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(AssertionError):
                return self.wait_for(text, 10)
        raise AssertionError(self.shown)


@pytest.fixture
def terminal(tmp_path):
    model = load_model(ModelConfig("demo:tiny-llama"), "causal_lm")
    inject_lora(model, LoraConfig(r=8, init_lora_weights=False))
    opened = Terminal(save_adapter(model, tmp_path / "adapter"), "--max-new-tokens", "8")
    yield opened
    opened.process.kill()
    opened.process.wait()
    os.close(opened.ours)


def test_a_person_asks_and_interrupts_and_leaves(terminal):
    before = terminal.wait_for("/help lists the commands")
    assert "Failed to load" not in before  # what torchao misses on this machine
    assert "_pytree" not in before
    terminal.wait_for("› ")
    terminal.type("What colour is the ball?\n")
    shown = terminal.wait_for("› ")
    assert "base" in shown
    assert "adapter" in shown
    assert "│" in shown
    terminal.type("/nix\n")
    assert "There is no command /nix" in terminal.wait_for("› ")
    terminal.interrupt_until("/quit or Ctrl-D")
    terminal.wait_for("› ")
    terminal.type("/base\n")
    terminal.wait_for("› ")
    terminal.type("And the train?\n")
    assert "adapter" not in terminal.wait_for("› ")
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0
