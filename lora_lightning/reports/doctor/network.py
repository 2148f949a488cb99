"""The Hugging Face Hub, and tokens: whether they are there, never what they are."""

from __future__ import annotations

import http.client
import netrc
import os
import urllib.error
import urllib.request
from pathlib import Path

from lora_lightning.reports.doctor.check import Finding

_SECONDS = 5


def hub() -> Finding:
    """Whether models and data sets can be had from the Hub. Training works without, from folders and demo models."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Finding(
            "warning", "not asked: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE to load models from the Hub"
        )
    try:
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models?limit=1", timeout=_SECONDS):
            return Finding("ok", f"{constants.ENDPOINT} answers")
    except urllib.error.HTTPError as error:  # somebody is there
        return Finding("warning", f"{constants.ENDPOINT} answers with status {error.code}", "try again later")
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Finding(
            "warning",
            f"{constants.ENDPOINT} cannot be reached ({error})",
            "local folders and demo: models work; behind a proxy set HTTPS_PROXY, for a mirror HF_ENDPOINT",
        )


def tokens() -> Finding:
    """Whether there is a token for the Hub and one for W&B."""
    from huggingface_hub import get_token

    told = {"Hub": get_token() is not None, "W&B": bool(os.environ.get("WANDB_API_KEY")) or _wandb_in_netrc()}
    text = ", ".join(f"{name}: {'there' if there else 'none'}" for name, there in told.items())
    missing = {"Hub": "private and gated models: hf auth login", "W&B": "logger=wandb: wandb login"}
    return Finding("ok", text, "; ".join(missing[name] for name, there in told.items() if not there))


def _wandb_in_netrc() -> bool:
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(path).authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
