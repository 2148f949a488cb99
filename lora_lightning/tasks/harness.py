"""Tasks of EleutherAI's evaluation harness (lm-eval), run on a model that is in memory."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_lightning.errors import LoraConfigError, did_you_mean
from lora_lightning.tasks.generate import evaluating


class Figure(NamedTuple):
    """What a task has measured.

    Attributes:
        value: The metric.
        stderr: Its standard error, where the harness tells one.
        higher_is_better: Which way is up; None where the task does not say.
    """

    value: float
    stderr: float | None
    higher_is_better: bool | None


class Harness:
    """Some tasks and how they are asked. Models come one after the other, and are asked the same.

    Args:
        tasks: Names of tasks or of groups of them, as ``lm-eval ls tasks`` lists them.
        limit: So many questions of each task (a share of them, below 1); None asks all.
        fewshot: So many worked examples before each question; None is what the task says.
        tasks_path: A folder of task definitions (YAML) beside those that the harness brings along.
        chat_template: Put questions as a person's turn through the tokenizer's chat template.
        batch_size: Questions at once.

    Raises:
        LoraConfigError: The package is not installed, or there is no such task.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        limit: float | None = None,
        fewshot: int | None = None,
        tasks_path: str | os.PathLike[str] | None = None,
        chat_template: bool = False,
        batch_size: int = 8,
    ) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise LoraConfigError(
                "Tasks of the evaluation harness need one more package: pip install lora-lightning[lm-eval]"
            )
        if limit is not None and limit <= 0:
            raise LoraConfigError(f"lm_eval_limit must be above 0, or null for all questions, got {limit!r}")
        if tasks_path is not None and not Path(tasks_path).is_dir():
            raise LoraConfigError(f"lm_eval_tasks_path={str(tasks_path)!r} is no folder")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # what it advises is about its own command line
        self.tasks = list(tasks)
        # The harness's own thousands of definitions take seconds to read, and may not be wanted.
        places = [False, True] if tasks_path is not None else [True]
        for with_its_own in places:
            self._manager = _manager(None if tasks_path is None else str(tasks_path), with_its_own)
            unknown = [task for task in self.tasks if not self._manager.match_tasks([task])]
            if not unknown:
                break
        if unknown:
            known = self._manager.all_tasks
            told = "".join(f"\n  - {task!r}{did_you_mean(task, known)}" for task in unknown)
            raise LoraConfigError(
                f"The evaluation harness has no such task:{told}\n`lm-eval ls tasks` lists its {len(known):,}; "
                "your own go into a folder, lm_eval_tasks_path=<folder>"
            )
        self._asked: dict[str, Any] = {"limit": limit, "num_fewshot": fewshot, "apply_chat_template": chat_template}
        self._batch_size = batch_size

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Figure]:
        """Ask a causal language model, which is in the end as it was: its modes and the random states too.

        Args:
            model: The model, on the device it is to run on.
            tokenizer: Its tokenizer.

        Returns:
            Each metric by ``task metric``, those of groups among them.

        Raises:
            LoraConfigError: The questions of a task cannot be had.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            with isolate_rng(), evaluating(model):
                with _heads_of_their_own(model):
                    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=self._batch_size)  # type: ignore[arg-type]
                told: Any = simple_evaluate(
                    lm,
                    tasks=self.tasks,
                    task_manager=self._manager,
                    log_samples=False,
                    bootstrap_iters=1000,
                    **self._asked,
                )
        except OSError as error:  # those of data sets and of the network are such
            raise LoraConfigError(f"the questions of {', '.join(self.tasks)} cannot be had: {error}") from error
        return {
            name: figure
            for results in (told["results"], told.get("groups") or {})
            for task, figures in results.items()
            for name, figure in _figures(task, figures, told["higher_is_better"].get(task) or {})
        }


@contextlib.contextmanager
def _heads_of_their_own(model: PreTrainedModel) -> Iterator[None]:
    """The harness ties weights anew, which would put the embedding in place of a head that was trained by itself."""
    vars(model)["tie_weights"] = lambda *_, **__: None
    try:
        yield
    finally:
        del vars(model)["tie_weights"]


@functools.cache
def _manager(tasks_path: str | None, with_its_own: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=tasks_path, include_defaults=with_its_own)


def _figures(task: str, figures: dict[str, Any], upwards: dict[str, bool | None]) -> list[tuple[str, Figure]]:
    """The harness writes ``metric,filter`` and ``metric_stderr,filter``; of the filter only what is not ``none``."""
    found = []
    for key, value in figures.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = figures.get(f"{metric}_stderr,{kept}")
        name = f"{task} {metric}" + ("" if kept == "none" else f" ({kept})")
        error = float(stderr) if isinstance(stderr, (int, float)) else None
        found.append((name, Figure(float(value), error, upwards.get(metric))))
    return found
