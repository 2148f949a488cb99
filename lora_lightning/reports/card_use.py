"""How an adapter is used, in a model card: code that runs as it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lora_lightning.adapters.facts import WEIGHTS_FILE
from lora_lightning.adapters.hub import id_of
from lora_lightning.tasks.task_types import labels_in, of_task_type

_RANKS_OF_VLLM = (8, 16, 32, 64, 128, 256, 320, 512)
# What has a row (the A of an embedding: a column) for each token, as transformers' models call them.
_OF_TOKENS = re.compile(
    r"\.(embed_tokens|wte|word_embeddings|embed_in|shared|lm_head|embed_out)"
    r"(?P<kind>\.weight|\.lora_B\.weight|\.lora_embedding_A)$"
)


def in_python(
    adapter: Path, config: Mapping[str, Any], *, base: str, repo: str, task: str, below: Sequence[str] = ()
) -> str:
    """Loading it with PEFT, and with this package.

    Args:
        adapter: Its folder.
        config: Its ``adapter_config.json``.
        base: What the base model is called.
        repo: What it is called itself.
        task: Its task type.
        below: The adapters that were folded into the base before it: folders, or ``owner/name[@revision]``.
    """
    place, loader = json.dumps(repo), of_task_type(task).auto_class
    labels = labels_in(adapter) if task in ("SEQ_CLS", "TOKEN_CLS") else None
    with_tokenizer = (adapter / "tokenizer_config.json").is_file()
    arguments = json.dumps(base) + ("" if labels is None else f", num_labels={labels}")
    lines = [
        "from peft import PeftModel",
        f"from transformers import {loader}{', AutoTokenizer' * with_tokenizer}",
        "",
        *([f"tokenizer = AutoTokenizer.from_pretrained({place})"] if with_tokenizer else []),
        f"model = {loader}.from_pretrained({arguments})",
    ]
    if rows := _rows_in(adapter, config):
        lines.append(f"model.resize_token_embeddings(max({rows}, model.get_input_embeddings().num_embeddings))")
    lines += [f"model = PeftModel.from_pretrained(model, {_arguments(each)}).merge_and_unload()" for each in below]
    code = "\n".join([*lines, f"model = PeftModel.from_pretrained(model, {place})"])
    return f"""## How to use it

With PEFT:

```python
{code}
```

With lora_lightning, in place of that last line; it merges it too, and goes on training it
(`LoraCallback(adapter={place})`):

```python
from lora_lightning import load_adapter

load_adapter(model, {place})
```"""


def in_vllm(base: str, repo: str, name: str, r: int) -> str:
    """Serving it with vLLM, whose largest rank has to be said."""
    rank = next((each for each in _RANKS_OF_VLLM if each >= r), r)
    serve = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={repo}"
    return f"## How to use it\n\n```sh\n{serve}\n```"


def in_llama_cpp(file: str) -> str:
    """Giving it to llama.cpp beside the base's own file."""
    return f'## How to use it\n\n```sh\nllama-cli -m base.gguf --lora {file} -p "…"\n```'


def _arguments(adapter: str) -> str:
    """What names an adapter to PEFT, which asks for a revision by itself."""
    name, revision = id_of(adapter) or (adapter, None)
    return json.dumps(name) + ("" if revision is None else f", revision={json.dumps(revision)}")


def _rows_in(adapter: Path, config: Mapping[str, Any]) -> int:
    """How many tokens an adapter has values for; 0 where it has none for single tokens."""
    named = config.get("trainable_token_indices") or []
    rows = [token + 1 for each in (named.values() if isinstance(named, dict) else [named]) for token in each]
    with safe_open(adapter / WEIGHTS_FILE, "pt") as file:
        for key in file.keys():  # noqa: SIM118  # not a dict
            if found := _OF_TOKENS.search(key):
                rows.append(file.get_slice(key).get_shape()[1 if found["kind"] == ".lora_embedding_A" else 0])
    return max(rows, default=0)
