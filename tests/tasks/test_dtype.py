import pytest
import torch

from lora_lightning.tasks import dtype
from lora_lightning.tasks.dtype import is_native, pick_dtype

CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch):
    def describe(**abilities):
        for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            able = abilities.get(probe, False)
            monkeypatch.setattr(torch.cpu, probe, lambda able=able: able, raising=False)

    return describe


def test_auto_keeps_what_is_native(processor):
    processor(_is_avx512_bf16_supported=True)
    assert pick_dtype("auto", torch.bfloat16, CPU) == (torch.bfloat16, "")
    assert pick_dtype("auto", None, CPU) == (torch.float32, "")


def test_auto_takes_float32_where_bfloat16_is_emulated(processor):
    processor()
    picked, reason = pick_dtype("auto", torch.bfloat16, CPU)
    assert picked is torch.float32
    assert "bfloat16" in reason


def test_explicit_is_honoured_and_warned_about(processor):
    processor()
    picked, reason = pick_dtype("bfloat16", torch.float32, CPU)
    assert picked is torch.bfloat16
    assert "slower" in reason
    assert pick_dtype("float32", torch.bfloat16, CPU) == (torch.float32, "")


def test_a_torch_without_probes_has_no_native_bfloat16(monkeypatch):
    monkeypatch.setattr(dtype, "_CPU_BF16_PROBES", ("_no_such_probe",))
    assert not is_native(torch.bfloat16, CPU)
    assert not is_native(torch.float16, CPU)


@pytest.mark.parametrize("native", [True, False])
def test_gpu_is_asked_without_emulation(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert is_native(torch.bfloat16, torch.device("cuda")) is native
    assert is_native(torch.float16, torch.device("cuda"))
