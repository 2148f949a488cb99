"""What transformers and the Hub say when a model cannot be loaded, put so that one knows what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import errors
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lora_lightning.errors import LoraConfigError
from lora_lightning.tasks.model_config import ModelConfig

_CONTRADICTIONS = getattr(errors, "StrictDataclassError", ValueError)
"""What newer versions raise of a config.json whose fields do not go together."""


@contextmanager
def explained(config: ModelConfig) -> Iterator[None]:
    """Turn the errors of loading ``config.name`` into ones that say what was looked for and what to do.

    Raises:
        LoraConfigError: In place of an OSError, ValueError, ImportError or an error of the Hub's.
    """
    try:
        yield
    except LoraConfigError:
        raise
    except (OSError, ValueError, ImportError, HfHubHTTPError, _CONTRADICTIONS) as error:
        raise LoraConfigError(explain(config, error)) from error


def explain(config: ModelConfig, error: BaseException) -> str:
    """Say in a user's words why a model cannot be loaded, from the error and everything that led to it."""
    name, page = config.name, f"https://huggingface.co/{config.name}"
    chain = list(_causes(error))
    statuses = {getattr(getattr(cause, "response", None), "status_code", None) for cause in chain}

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in chain)

    if met(GatedRepoError) or (statuses & {401, 403} and not met(RepositoryNotFoundError)):
        return (
            f"The model {name!r} is gated: the Hub refused the download. Accept its licence at {page}, make a token at "
            "https://huggingface.co/settings/tokens and set it as the environment variable HF_TOKEN."
        )
    if met(RevisionNotFoundError):
        return f"The model {name!r} has no revision {config.revision!r}; its branches and tags are at {page}/tree/main."
    if met(RepositoryNotFoundError):
        return (
            f"There is no model {name!r}: {_looked_at(name)}, and the Hub has none at {page}. "
            "If it is a private one, set the environment variable HF_TOKEN to a token that may read it."
        )
    if met(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        return (
            f"The model {name!r} cannot be had: {_looked_at(name)}, it is not in the Hub's cache on this machine, and "
            f"{page} cannot be reached (offline?). Give the path of a local folder, or one of the demo: models."
        )
    if "trust_remote_code" in str(error):
        return (
            f"The model {name!r} brings code of its own, which runs only with trust_remote_code=true. "
            f"Read the code at {page}/tree/main first."
        )
    return f"The model {name!r} cannot be loaded: {error}"


def check_local_folder(config: ModelConfig) -> None:
    """Refuse what can only be a path and is no folder of a model.

    Raises:
        LoraConfigError: Naming the folder that was looked for, or saying that it holds an adapter only.
    """
    folder = Path(config.name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return
        if (folder / "adapter_config.json").is_file():
            raise LoraConfigError(
                f"{folder} holds an adapter, not a model: give the base model as the name, the folder as the adapter."
            )
        raise LoraConfigError(f"{folder} is no folder of a model: there is no config.json in it.")
    if folder.is_absolute() or config.name.startswith((".", "~")) or config.name.count("/") > 1:
        raise LoraConfigError(f"There is no model {config.name!r}: {_looked_at(config.name)}.")


def _looked_at(name: str) -> str:
    return f"there is no folder {Path(name).expanduser().absolute()}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
