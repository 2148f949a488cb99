"""What every test starts from: no network, a fixed seed, one thread, tiny random models."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from hypothesis import HealthCheck, settings

# How long an example takes is a matter of what else the machine does; in CI each run tries the same ones.
settings.register_profile(
    "here", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("here")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has started this in the background; processes that tests start would ignore Ctrl-C as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    os.environ.pop("PL_GLOBAL_SEED", None)  # what a test before has seeded; before fixtures of a module too


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """Where the demo models of a session lie."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def demo_cache(demo_folder):
    """Demo models are made in a folder of this session, not in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(demo_folder))
        yield demo_folder


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> SimpleNamespace:
    """A task of the evaluation harness that needs no download: its folder, and its rows."""
    folder = tmp_path_factory.mktemp("tasks")
    things = ("ball", "boat", "bird", "book", "chair", "clock", "coat", "cup")
    # Made-up colours of like length in tokens: else the shortest is the likeliest to every model.
    rows = [
        {
            "question": f"What colour is the {thing}?",
            "choices": [f"The {thing} is {colour}." for colour in ("fuv", "gup", "hox")],
            "answer": number % 3,
        }
        for number, thing in enumerate(things)
    ]
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "colours.yaml").write_text(
        "task: colours\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/colours.jsonl}}, cache_dir: {folder}/cache}}\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\ndoc_to_choice: "{{choices}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return SimpleNamespace(folder=folder, rows=rows)


@pytest.fixture
def composed():
    """Composes a shipped configuration: composed("lora.r=8", config="train")."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_module("lora_lightning.conf", version_base="1.3"):
        yield lambda *overrides, config="train": compose(config, overrides=list(overrides))
    GlobalHydra.instance().clear()


@pytest.fixture
def tokens():
    """Token numbers ``(2, 9)`` below 64."""
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=5
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def shake():
    """Move everything that trains a little, so that no adapter is the identity any more."""

    def move(model, size=0.1):
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(size * torch.randn(parameter.shape, generator=generator))

    return move


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory):
    """A program to stand where ``sys.executable`` does; its processes need not import torch, Lightning, transformers.

    tests/warm/server.py says what they share and when a test wants the real one.
    """
    if sys.platform != "linux" or torch.cuda.is_available():  # CUDA and other systems' frameworks are not to be forked
        yield sys.executable
        return
    here, folder = Path(__file__).parent / "warm", tmp_path_factory.mktemp("warm")
    with tempfile.TemporaryDirectory() as short:  # the name of a socket has at most 107 characters
        place, program = Path(short) / "socket", folder / "python"
        start = shlex.join([sys.executable, "-IS", f"{here}/client.py", str(place), str(program)])
        program.write_text(f'#!/bin/sh\nexec {start} "$@"\n')
        program.chmod(0o755)
        with (folder / "server.txt").open("w") as log:
            server = subprocess.Popen(
                [sys.executable, here / "server.py", place],
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert server.stdout.readline() == b"ready\n", (folder / "server.txt").read_text()
        yield str(program)
        server.stdin.close()
        server.wait(60)


@pytest.fixture(scope="module")
def warm_starts(warm_python):
    """Processes that this one starts with ``sys.executable`` start warm, and those that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python)
        yield


@pytest.fixture
def processes(tmp_path, warm_python):
    """Runs a script in several real processes of one gloo group: processes(script, *arguments, world=2).

    Above the script, ``rank``, ``world``, ``out`` (a folder that all share) and ``arguments`` are set.
    """
    head = (
        "import os, sys\nfrom pathlib import Path\nimport torch\nimport torch.distributed as dist\n"
        "rank, world, out, arguments = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]\n"
        "torch.set_num_threads(1)\n"
        "dist.init_process_group('gloo', init_method=f'file://{out}/meeting', rank=rank, world_size=world)\n"
    )

    def run(script: str, *arguments: object, world: int = 2) -> Path:
        out = tmp_path / f"run{time.monotonic_ns()}"
        out.mkdir()
        # Threads that torch leaves behind have aborted a process that had done all it was to do.
        tail = "\ndist.destroy_process_group()\nsys.stdout.flush()\nsys.stderr.flush()\nos._exit(0)\n"
        (out / "script.py").write_text(head + script + tail)
        env = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
        started = []
        for rank in range(world):
            command = [warm_python, out / "script.py", str(rank), str(world), out, *map(str, arguments)]
            with (out / f"rank{rank}.txt").open("w") as log:
                started.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(timeout=500) for process in started]
        finally:
            for process in started:
                process.kill()
        logs = [(out / f"rank{rank}.txt").read_text()[-3000:] for rank in range(world)]
        assert codes == [0] * world, "\n".join(logs)
        return out

    return run


@pytest.fixture
def wandb_offline(tmp_path, monkeypatch):
    """A folder for the real W&B, which keeps everything there and on this machine; its run is ended after the test."""
    place = tmp_path / "wandb_home"
    place.mkdir()
    for name in ("DIR", "CACHE_DIR", "DATA_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(place))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield place
    if (wandb := sys.modules.get("wandb")) is not None:
        wandb.finish()


@pytest.fixture
def wandb_records():
    """Reads what an ended offline run would send: wandb_records(folder, kind) gives the records of that kind.

    Its file is in LevelDB's log format after a header of 7 bytes: blocks of 32 KiB, in them fragments of a checksum
    (4 bytes), a length (2) and a kind (1, or 2, 3 … 4 where a record is spread), and in those protocol buffers.
    """

    def read(folder: Path, kind: str) -> list:
        import wandb
        from wandb.proto.wandb_internal_pb2 import Record

        wandb.teardown()  # the process that writes the file may still be writing when a run has ended
        (path,) = folder.rglob("*.wandb")
        raw, at, fragments, found = path.read_bytes(), 7, b"", []
        while at + 7 <= len(raw):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            size, position = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
            fragments += raw[at + 7 : at + 7 + size]
            at += 7 + size
            if position in (1, 4):
                record = Record.FromString(fragments)
                fragments = b""
                if record.WhichOneof("record_type") == kind:
                    found.append(getattr(record, kind))
        return found

    return read
