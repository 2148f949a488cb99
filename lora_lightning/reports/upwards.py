"""Which way is up for a metric, told by the words of its name."""

from __future__ import annotations

_MORE = {"acc", "accuracy", "auc", "auroc", "bleu", "f1", "precision", "recall", "rouge"}
_LESS = {"brier", "cer", "ece", "error", "errors", "loss", "mae", "mse", "nll", "perplexity", "ppl", "rmse", "wer"}


def is_higher_better(name: str) -> bool | None:
    """Whether more of a metric is better; None where its name does not say. The last word that does counts.

    >>> [is_higher_better(name) for name in ("val_loss", "val_answer_accuracy", "val_mae", "val_length")]
    [False, True, False, None]
    """
    known = [word in _MORE for word in name.lower().split("_") if word in _MORE | _LESS]
    return known[-1] if known else None
