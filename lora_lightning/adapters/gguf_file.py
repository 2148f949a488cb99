"""An adapter as llama.cpp reads it: one GGUF file beside the base's.

What stands in such a file: ``general.type`` is ``adapter``, ``adapter.type`` is ``lora``, and each adapted weight has
``<name>.lora_a (r, in)`` and ``<name>.lora_b (out, r)`` under the name that the base's file has for it. llama.cpp
multiplies their product with ``adapter.lora.alpha / r``, ``r`` being that tensor's own, so that scales of another kind
(rsLoRA, ``alpha_pattern``) are folded into ``B``. Some architectures have the rows of their query and key projections
in another order there, and these rows of ``B`` go with them. Source: llama.cpp, ``convert_lora_to_gguf.py``,
``convert_hf_to_gguf.py`` (which says what is done to the weights of an architecture), ``src/llama-adapter.cpp``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_lightning.adapters.folder import check_finite, read_peft_config, read_weights
from lora_lightning.adapters.hub import adapter_folder, on_the_hub
from lora_lightning.adapters.pairs import Pair, pairs_of, refuse_changed_base
from lora_lightning.adapters.written import refuse_existing, unwritten
from lora_lightning.errors import AdapterError, did_you_mean


class _Architecture(NamedTuple):
    """What llama.cpp calls a family of models, and whether it turns the heads of query and key around."""

    name: str
    turned: bool = False


# By transformers' model_type: those whose weights go into a GGUF file as they are, but for the order of rows.
_ARCHITECTURES = {
    "cohere": _Architecture("command-r"),
    "cohere2": _Architecture("cohere2"),
    "exaone4": _Architecture("exaone4"),
    "gemma": _Architecture("gemma"),
    "gemma2": _Architecture("gemma2"),
    "gemma3_text": _Architecture("gemma3"),
    "granite": _Architecture("granite", turned=True),
    "llama": _Architecture("llama", turned=True),
    "mistral": _Architecture("llama", turned=True),
    "olmo": _Architecture("olmo", turned=True),
    "olmo2": _Architecture("olmo2"),
    "olmo3": _Architecture("olmo2"),
    "phi3": _Architecture("phi3"),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
    "seed_oss": _Architecture("seed_oss"),
    "smollm3": _Architecture("smollm3", turned=True),
    "starcoder2": _Architecture("starcoder2"),
}
_NOT_THERE = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")


@dataclass(frozen=True)
class GgufReport:
    """What :func:`write_gguf` gives back; prints as one line.

    Attributes:
        path: The file.
        architecture: What llama.cpp calls the base's.
        tensors: How many weights are adapted.
        alpha: Numerator of the one scale that the file knows.
        folded: Whether a scale of another kind went into ``B``.
        turned: How many of the weights had their rows put in llama.cpp's order.
    """

    path: Path
    architecture: str
    tensors: int
    alpha: float
    folded: bool
    turned: int

    def __str__(self) -> str:
        """Architecture, number of weights, and what was done to them."""
        done = [f"alpha {self.alpha:g}"]
        done += ["scales folded into B"] if self.folded else []
        done += [f"rows of {self.turned} query and key projections in llama.cpp's order"] if self.turned else []
        return f"a GGUF adapter for {self.architecture}: {self.tensors} weights, {', '.join(done)}"


@torch.no_grad()
def write_gguf(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    base: Mapping[str, Any],
    *,
    name: str | None = None,
    base_name: str | None = None,
) -> GgufReport:
    """Write an adapter as a GGUF file, in float32.

    Args:
        source: An adapter folder, ours or PEFT's, or one on the Hub.
        path: The file to write; it must not be there yet.
        base: The base model's ``config.json``: ``model_type``, the numbers of layers and heads, whether its embedding
            and head are tied.
        name: What the file says it is called; None takes the folder's name.
        base_name: What it says the base is called; None takes the adapter's word.

    Returns:
        What was written and how.

    Raises:
        AdapterError: llama.cpp has no place for something in the adapter, the base is of an architecture that is not
            known here or to the ``gguf`` package, that package is missing, or the file is there already.
    """
    refuse_existing(path)
    gguf = _package()
    place, path = adapter_folder(source), Path(path)
    config, weights = read_peft_config(place), read_weights(place)
    check_finite(weights)
    refuse_changed_base(config, str(source))
    pairs = pairs_of(config, weights, str(source))
    text = base.get("text_config") or base
    architecture = _architecture(text, gguf)
    names = _names(pairs, architecture, text, gguf, str(source))
    _refuse(config, weights, pairs, names, bool(base.get("tie_word_embeddings", text.get("tie_word_embeddings"))))
    alpha = pairs[0].alpha or 1.0
    heads = _heads(text) if architecture.turned else {}
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name or place.name)
    if known := base_name or config.get("base_model_name_or_path"):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, known if on_the_hub(known) else os.path.basename(known.rstrip("/")))
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    if tokens := config.get("alora_invocation_tokens"):
        if not hasattr(gguf.Keys.Adapter, "ALORA_INVOCATION_TOKENS"):
            raise AdapterError("the installed gguf package does not know aLoRA: pip install --upgrade gguf")
        kinds = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
        writer.add_key_value(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, list(tokens), *kinds)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for pair in pairs:
        for key, value in _tensors(pair, names[pair.a_key], weights, alpha, heads):
            writer.add_tensor(key, value.contiguous().numpy())
    _write(writer, path)
    return GgufReport(
        path=path,
        architecture=architecture.name,
        tensors=len(pairs),
        alpha=float(alpha),
        folded=any(_fold(pair, alpha) != 1 for pair in pairs),
        turned=sum(pair.layer.endswith(tuple(heads)) for pair in pairs) if heads else 0,
    )


def turned(b: Tensor, heads: int) -> Tensor:
    """Rows ``(heads · 2 · d, …)`` in llama.cpp's order: each head's two halves of ``d`` one by one in turn.

    transformers rotates a head's first half with its second, llama.cpp neighbours with each other.

    >>> turned(torch.arange(8)[:, None], heads=2).flatten().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return b.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def known_architectures() -> list[str]:
    """The values of ``model_type`` whose adapters can be written."""
    return sorted(_ARCHITECTURES)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise AdapterError("a GGUF file needs the package gguf: pip install lora-lightning[gguf]") from error
    return gguf


def _architecture(base: Mapping[str, Any], gguf: Any) -> _Architecture:
    kind = str(base.get("model_type"))
    if kind not in _ARCHITECTURES:
        raise AdapterError(
            f"the base is a model of type {kind!r}{did_you_mean(kind, _ARCHITECTURES)}, and what llama.cpp does to the "
            f"weights of those is not known here. Known are {', '.join(known_architectures())}. Merge the adapter, and "
            "convert the whole model with llama.cpp's convert_hf_to_gguf.py"
        )
    if _ARCHITECTURES[kind].name not in gguf.MODEL_ARCH_NAMES.values():
        raise AdapterError(f"the installed gguf package does not know {kind}: pip install --upgrade gguf")
    return _ARCHITECTURES[kind]


def _names(
    pairs: Sequence[Pair], architecture: _Architecture, base: Mapping[str, Any], gguf: Any, source: str
) -> dict[str, str]:
    """The base file's name of each weight, by the key of ``A``."""
    which = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = gguf.get_tensor_name_map(which, int(base["num_hidden_layers"]))
    names = {pair.a_key: known.get_name(pair.layer) for pair in pairs}
    if lost := [pair.layer for pair in pairs if names[pair.a_key] is None]:
        more = f" and {len(lost) - 4} more" if lost[4:] else ""
        raise AdapterError(
            f"{source} adapts what {architecture.name} has no name for in GGUF files: {', '.join(lost[:4])}{more}. Was "
            "it trained on a model inside another? Names have to be those of the base model's own files"
        )
    return {key: f"{name}.weight" for key, name in names.items()}


def _refuse(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    pairs: Sequence[Pair],
    names: Mapping[str, str],
    tied: bool,
) -> None:
    problems = [f"{key}: there is no place for it in a GGUF adapter" for key in _NOT_THERE if config.get(key)]
    if config.get("layer_replication"):
        problems.append("layer_replication: the base's file has each layer once")
    known = {key for pair in pairs for key in (pair.a_key, pair.b_key)}
    others = [key for key in weights if key not in known and not key.endswith(".base_layer.weight")]
    if others and not problems:
        problems.append(f"only lora_A and lora_B are read there, not {', '.join(sorted(others)[:4])}")
    problems += [f"{pair.layer} is not a matrix" for pair in pairs if weights[pair.a_key].dim() != 2]
    ends = {"token_embd.weight", "output.weight"} & set(names.values())
    if tied and ends:
        problems.append("the embedding and the head are one weight in the base's file, and cannot be adapted there")
    if problems:
        listed = "".join(f"\n  - {each}" for each in problems)
        raise AdapterError(f"llama.cpp cannot read this adapter; merge it, and convert the whole model:{listed}")


def _heads(base: Mapping[str, Any]) -> dict[str, int]:
    """How many heads the rows of a projection belong to, by the end of its name."""
    queries = int(base["num_attention_heads"])
    return {"q_proj": queries, "k_proj": int(base.get("num_key_value_heads") or queries)}


def _fold(pair: Pair, alpha: float) -> float:
    """What ``B`` takes up, so that ``alpha / r`` is the rest of the scale."""
    return pair.scaling / (alpha / pair.r)


def _tensors(
    pair: Pair, name: str, weights: Mapping[str, Tensor], alpha: float, heads: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    a, b = (weights[key].to(torch.float32) for key in (pair.a_key, pair.b_key))
    if (fold := _fold(pair, alpha)) != 1:
        b = (weights[pair.b_key].double() * fold).float()
    last = pair.layer.rpartition(".")[2]
    if last in heads:
        b = turned(b, heads[last])
    # An embedding's rows are looked up in A, which has one for each token there.
    yield f"{name}.lora_a", a.t() if name == "token_embd.weight" else a
    yield f"{name}.lora_b", b


def _write(writer: Any, path: Path) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file(aside)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(aside, path)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        aside.unlink(missing_ok=True)
