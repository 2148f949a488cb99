"""The model card of an adapter, made from the run that trained it: what the Hub shows as its page."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open

from lora_lightning.adapters import read_record
from lora_lightning.adapters.facts import WEIGHTS_FILE
from lora_lightning.adapters.folder import read_peft_config
from lora_lightning.adapters.hub import id_of, on_the_hub, page_of
from lora_lightning.adapters.pairs import A_ENDINGS, of_config
from lora_lightning.data.sources import READERS
from lora_lightning.reports import card_parts as parts
from lora_lightning.reports import card_use as use
from lora_lightning.reports.page.folder import Run, read_run
from lora_lightning.reports.page.words import bytes_of
from lora_lightning.tasks.demo import original_of
from lora_lightning.tasks.task_types import of_task_type

PICTURES = {"loss.png": "Training and validation loss", "insight.png": "What the updates of the layers came to"}
_TASKS = {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS"}
_FORMS = {"peft": "peft", "vllm": "peft", "gguf": "gguf"}


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        adapter: The adapter folder whose numbers the card has.
        repo: ``owner/name`` that it will have on the Hub, or the name of a folder.
        run: The folder of the run that trained it; None tells what the adapter itself says.
        origin: The adapter folder that this one was made of, where it was.
        base: Another name of the base model than the adapter's.
        form: What lies beside the card: ``peft``, ``vllm`` or ``gguf``.
        file: The GGUF file's name.
    """

    adapter: Path
    repo: str
    run: Path | None = None
    origin: Path | None = None
    base: str | None = None
    form: str = "peft"
    file: str = "adapter.gguf"

    @property
    def name(self) -> str:
        """What it is called."""
        return self.repo.rpartition("/")[2]

    @property
    def at_the_end(self) -> bool:
        """Whether it is the adapter that the training ended with, which the run's figures are of."""
        origin = (self.origin or self.adapter).absolute()
        return self.run is not None and origin.is_relative_to(self.run.absolute() / "adapter")


@dataclass(frozen=True)
class _Known:
    """A model or an adapter as others know it: a name on the Hub, else what its folder is called here."""

    name: str
    shared: bool = False

    @property
    def place(self) -> str:
        """What it is loaded from."""
        return self.name if self.shared else f"path/to/{self.name.rpartition(':')[2] or 'base'}"


def write_card(subject: Subject, folder: Path) -> Path:
    """Write ``README.md`` into a folder, with the run's pictures beside it.

    Returns:
        The card.
    """
    found = [name for name in PICTURES if subject.run is not None and (subject.run / name).is_file()]
    for name in found:
        (folder / name).write_bytes((subject.run / name).read_bytes())  # type: ignore[operator]  # found in it
    path = folder / "README.md"
    path.write_text(model_card(subject, pictures=found), encoding="utf-8")
    return path


def model_card(subject: Subject, *, pictures: Sequence[str] = ()) -> str:
    """The card's text: a YAML header that the Hub understands, and what people want to know.

    Args:
        subject: What it is about.
        pictures: Files beside the card that it shows.
    """
    config, run = read_peft_config(subject.adapter), None if subject.run is None else read_run(subject.run)
    base, task = _base_of(subject.base or config.get("base_model_name_or_path") or ""), _task(config, run)
    body = [
        f"# {subject.name}",
        _summary(subject, config, base),
        *parts.figures(run, at_the_end=subject.at_the_end),
        *(f"![{PICTURES.get(each, each)}]({each})" for each in pictures),
        *parts.samples(run),
        _use(subject, config, base, task),
        *parts.settings(run),
        *parts.environment(run),
    ]
    return f"---\n{_header(subject, base, task, run)}\n---\n\n" + "\n\n".join(body) + "\n"


def _header(subject: Subject, base: _Known, task: str, run: Run | None) -> str:
    known = base.name if base.shared else None
    data = str(parts.node(run, "data").get("path") or "")
    is_path = Path(data).suffix.lower() in READERS or os.path.exists(data)
    results = _results(run, task) if run is not None and subject.at_the_end else []
    header = ModelCardData(
        base_model=known,
        library_name=_FORMS[subject.form],
        pipeline_tag=of_task_type(task).pipeline,
        tags=["lora", "lora-lightning", *([f"base_model:adapter:{known}"] if known else [])],
        datasets=[data] if id_of(data) and not is_path else None,
        model_name=subject.name if results else None,
        eval_results=results or None,
    )
    return header.to_yaml().strip()


def _results(run: Run, task: str) -> list[EvalResult]:
    """What was measured at the end, as the Hub lists it."""
    data = parts.node(run, "data")
    name = str(data.get("path") or "") or str(data.get("_target_", "")).rpartition(".")[2] or "data"
    found = []
    for key, value in run.result.items():
        split, _, metric = key.partition("_")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if split in ("val", "test") and number and not key.endswith("_before"):
            found.append(
                EvalResult(
                    task_type=of_task_type(task).pipeline,
                    dataset_type="custom",
                    dataset_name=parts.public(name),
                    dataset_split="validation" if split == "val" else split,
                    metric_type=metric,
                    metric_value=round(float(value), 6),
                    metric_name=metric.replace("_", " "),
                )
            )
    return found


def _summary(subject: Subject, config: Mapping[str, Any], base: _Known) -> str:
    linked = f"[{base.name}]({page_of(base.name)})" if base.shared else base.name
    kind = "aLoRA" if config.get("alora_invocation_tokens") else "DoRA" if config.get("use_dora") else "LoRA"
    stable = ", rank-stabilised" if config.get("use_rslora") else ""
    parameters, updates = _counted(subject.adapter)
    size = bytes_of((subject.adapter / WEIGHTS_FILE).stat().st_size)
    sentences = [
        f"A {kind} adapter{f' over {linked}' if linked else ''}: rank {config['r']}, alpha {config['lora_alpha']:g} "
        f"(scale {of_config(config).scaling():.4g}{stable}), {parameters:,} parameters in {updates} updates, {size}.",
        f"Layers: {_targets(config)}.",
    ]
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        sentences.append("Some layers have a rank or a scale of their own: see `adapter_config.json`.")
    record = read_record(subject.adapter)
    if chain := record.get("bases"):
        below = ", ".join(f"`{_adapter_at(each).name}`" for each in chain)
        sentences.append(f"It goes over that base with {below} folded in, in this order.")
    if cut := record.get("resized"):
        sentences.append(f"Cut down from rank {cut['from']}; {cut['kept']:.2%} of ‖ΔW‖² were kept.")
    if subject.form == "vllm":
        sentences.append("Every layer's scale is folded into its B, so that one scale is right for all.")
    return " ".join(sentences)


def _use(subject: Subject, config: Mapping[str, Any], base: _Known, task: str) -> str:
    if subject.form == "gguf":
        return use.in_llama_cpp(subject.file)
    if subject.form == "vllm":
        return use.in_vllm(base.place, subject.repo, subject.name, config["r"])
    below = [_adapter_at(each).place for each in read_record(subject.adapter).get("bases", ())]
    return use.in_python(subject.adapter, config, base=base.place, repo=subject.repo, task=task, below=below)


def _base_of(name: str) -> _Known:
    if original := original_of(name):
        return _Known(original, shared=True)
    return _Known(name, shared=True) if name and on_the_hub(name) else _Known(os.path.basename(name.rstrip("/")))


def _adapter_at(place: str) -> _Known:
    """An adapter of a chain: that of a run, as ``run/adapter`` or ``run/adapter/NAME``, goes by the run's name too."""
    if id_of(place):
        return _Known(place, shared=True)
    last = Path(place).relative_to(Path(place).anchor).parts[-3:]
    return _Known("/".join(last[last.index("adapter", 1) - 1 :] if "adapter" in last[1:] else last[-1:]))


def _task(config: Mapping[str, Any], run: Run | None) -> str:
    """PEFT's name for what the model does."""
    target = str(parts.node(run, "task").get("_target_", "")).rpartition(".")[2]
    return str(config.get("task_type") or _TASKS.get(target, "CAUSAL_LM"))


def _counted(adapter: Path) -> tuple[int, int]:
    """Values in the file, and low-rank updates, from its header."""
    with safe_open(adapter / WEIGHTS_FILE, "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  # not a dict
    return sum(map(math.prod, shapes.values())), sum(key.endswith(A_ENDINGS) for key in shapes)


def _targets(config: Mapping[str, Any]) -> str:
    named = [config.get("target_modules") or [], config.get("target_parameters") or []]
    return ", ".join(f"`{entry}`" for each in named for entry in ([each] if isinstance(each, str) else each)) or "none"
