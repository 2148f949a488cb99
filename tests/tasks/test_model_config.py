import pytest
from omegaconf import OmegaConf

from lora_lightning.errors import LoraConfigError
from lora_lightning.tasks import ModelConfig


def test_of_understands_every_form():
    expected = ModelConfig(name="acme/model", dtype="float32")
    fields = {"name": "acme/model", "dtype": "float32"}
    assert ModelConfig.of(expected) is expected
    assert ModelConfig.of(fields) == expected
    assert ModelConfig.of(OmegaConf.create(fields)) == expected
    assert ModelConfig.of("acme/model") == ModelConfig(name="acme/model")


def test_everything_wrong_is_told_at_once():
    with pytest.raises(LoraConfigError) as caught:
        ModelConfig.of({"nam": "x", "torch_dtype": "bf16", "dtype": "bfloat", "compile": "yes", "revision": 3})
    message = str(caught.value)
    for part in ("'nam' (did you mean name", "'torch_dtype' (did you mean dtype", "'bfloat' (did you mean bfloat16",
                 "compile must be true or false, got 'yes'", "revision must be text", "name must be"):  # fmt: skip
        assert part in message


@pytest.mark.parametrize("value", [None, 3, ["x"], "", {"name": None}, {}])
def test_no_name_is_an_error(value):
    with pytest.raises(LoraConfigError, match="name"):
        ModelConfig.of(value)
