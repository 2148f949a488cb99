"""Where a model's files lie: of demo models, in folders, and in the Hub's cache without a network."""

from __future__ import annotations

import shutil

import pytest
from huggingface_hub import constants

from lora_lightning.errors import LoraConfigError
from lora_lightning.tasks import ModelConfig, load_model, load_tokenizer
from lora_lightning.tasks.files import fetch_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _cache(demo_cache):
    return demo_cache


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub's cache as a download leaves it, with owner/tiny in it; gives the folder of the files."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "models--owner--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    return shutil.copytree(fetch_model(ModelConfig("demo:tiny-llama")), place / "snapshots" / COMMIT)


def test_what_was_downloaded_before_is_found_and_loads_without_a_network(hub):
    config = ModelConfig("owner/tiny")
    assert fetch_model(config) == hub
    assert load_tokenizer(config)("a")["input_ids"]
    assert load_model(config, "causal_lm").num_parameters() > 1000


def test_files_without_weights_are_no_model(hub):
    (hub / "model.safetensors").unlink()
    with pytest.raises(LoraConfigError, match=r"neither \.safetensors nor \.bin"):
        fetch_model(ModelConfig("owner/tiny"))
    (hub / "pytorch_model.bin").write_bytes(b"weights")
    assert fetch_model(ModelConfig("owner/tiny")) == hub


def test_a_model_that_was_never_downloaded_is_told(hub):
    with pytest.raises(LoraConfigError, match="'owner/other' cannot be had"):
        fetch_model(ModelConfig("owner/other"))


def test_a_folder_is_taken_as_it_is(hub, tmp_path):
    assert fetch_model(ModelConfig(str(hub))) == hub.resolve()
    with pytest.raises(LoraConfigError, match="There is no model"):
        fetch_model(ModelConfig(str(tmp_path / "nowhere")))
