"""Each check against a machine that has what it looks for, and one that has not."""

from __future__ import annotations

import http.server
import os
import threading
import time

import pytest

from lora_lightning.reports.doctor import CHECKS, Check, Finding, examine, machine, running
from lora_lightning.reports.doctor.check import run_python
from lora_lightning.reports.doctor.little_training import train_a_little
from lora_lightning.reports.doctor.machine import devices, disk, memory, precision
from lora_lightning.reports.doctor.network import hub, tokens
from lora_lightning.reports.doctor.packages import extras, packages


def test_a_check_that_hangs_is_given_up():
    begun = time.monotonic()
    found = examine(Check("slow", lambda: time.sleep(60), 0.2))
    assert time.monotonic() - begun < 30
    assert found.status == "failure"
    assert "within 0.2 seconds" in found.text
    assert examine(Check("slow", lambda: time.sleep(60), 0.2, "warning")).status == "warning"


def test_an_error_in_a_check_is_a_finding():
    def broken():
        raise OSError("the disk\nis gone")

    assert examine(Check("broken", broken, 5)) == Finding(
        "failure", "the check itself failed: OSError: the disk is gone"
    )


def test_no_process_is_left_behind():
    ran = run_python([["-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]], seconds=2)
    assert ran.codes == [None]
    with pytest.raises(ProcessLookupError):
        os.kill(int(ran.outputs[0]), 0)


@pytest.mark.parametrize(
    "check", [devices, memory, disk, precision, packages, extras], ids=lambda check: check.__name__
)
def test_this_machine_is_in_order(check):
    assert check().status in ("ok", "warning")


@pytest.mark.parametrize(
    ("half", "is_native", "advised"),
    [
        (2e12, True, "trainer.precision=bf16-mixed, or a base in bfloat16 (model.dtype=auto)"),
        (1.1e12, True, "float32 (model.dtype=float32); bfloat16 is no faster here"),
        (1e11, False, "float32 (model.dtype=auto takes it by itself); bfloat16 is 10.0 times slower here"),
        (2e12, False, "float32 (model.dtype=auto takes it by itself); bfloat16 is only emulated here"),
        (None, True, "float32 (model.dtype=float32); bfloat16 does not run here"),
    ],
)
def test_the_precision_that_is_advised_is_that_of_the_measurement(half, is_native, advised):
    assert machine._advised({"float32": 1e12, "bfloat16": half}, is_native) == advised


def test_the_limit_of_a_container_counts(tmp_path):
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text("3000000000\n")
    (tmp_path / "memory.stat").write_text("inactive_file 500000000\n")
    found = memory(tmp_path)
    assert found.status == "warning"
    assert found.text.startswith("1.5 of ")
    assert "below this container's limit" in found.text


def distribution(folder, name, version, *more):
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("\n".join([f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *more, ""]))


def test_compromised_releases_are_a_failure(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    distribution(tmp_path, "lightning", "2.6.3")
    found = packages()
    assert found.status == "failure"
    assert "lightning 2.6.3" in found.text
    assert "compromised" in found.remedy


def test_what_is_too_old_or_missing_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    needs = ["Requires-Dist: transformers>=4.56", "Requires-Dist: no-such-thing>=1", "Requires-Dist: torch>=1"]
    distribution(tmp_path, "lora-lightning", "0.1.0", *needs, "Requires-Dist: other; extra == 'more'")
    distribution(tmp_path, "transformers", "4.40")
    found = packages()
    assert found.status == "failure"
    assert found.text.endswith("does not fit: transformers 4.40 (>=4.56), no-such-thing is missing (>=1)")


def test_extras_are_told_by_what_they_need(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    lines = ["Provides-Extra: one", "Provides-Extra: two", "Requires-Dist: torch>=1; extra == 'one'"]
    distribution(tmp_path, "lora-lightning", "0.1.0", *lines, "Requires-Dist: no-such-thing; extra == 'two'")
    found = extras()
    assert found.text == "one; not installed: two"
    assert "lora-lightning[two]" in found.remedy


@pytest.fixture
def server(monkeypatch):
    """A Hub of this machine's own that answers with a status, or with nonsense: server(200)."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    running = []

    def serve(status):
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if status is None:
                    self.wfile.write(b"what?\r\n")
                    return
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_):
                pass

        made = http.server.HTTPServer(("127.0.0.1", 0), Answer)
        running.append(made)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{made.server_port}")
        return made

    yield serve
    for made in running:
        made.shutdown()


def test_the_hub(server, monkeypatch):
    from huggingface_hub import constants

    server(200)
    assert hub().status == "ok"
    server(503)
    assert hub().status == "warning"
    server(None)  # somebody else's port
    assert "cannot be reached" in hub().text
    gone = server(200)
    gone.shutdown()
    gone.server_close()
    found = hub()
    assert found.status == "warning"
    assert "cannot be reached" in found.text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in hub().text


def test_tokens_are_told_of_and_never_shown(tmp_path, monkeypatch):
    secret = "hf_abcdefghijklmnop"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    found = tokens()
    assert found.text == "Hub: there, W&B: none"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {secret}\n")
    found = tokens()
    assert found.text == "Hub: there, W&B: there"
    assert secret not in repr(found)


def test_two_processes_meet_and_it_is_told_where_they_cannot(monkeypatch):
    assert running.processes() == Finding("ok", "two processes on this machine reach each other (gloo)")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothere0")
    found = running.processes()
    assert found.status == "warning"
    assert "GLOO_SOCKET_IFNAME=lo" in found.remedy


def test_the_known_result_is_this_machines_too(demo_cache):
    told = train_a_little("cpu")
    assert told["loss"] == pytest.approx(running.LOSS, abs=running.TOLERANCE / 5)


def test_another_result_is_a_failure(monkeypatch, demo_cache):
    monkeypatch.setattr(running, "LOSS", 3.0)
    found = running.training()
    assert found.status == "failure"
    assert "should be 3.0000" in found.text


def test_checks_have_names_of_their_own_and_limits():
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(0 < check.seconds <= 300 for check in CHECKS)
