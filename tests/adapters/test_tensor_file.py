"""Files against safetensors' own writer, and what passes through memory on the way there and back."""

import os
import stat

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lightning import AdapterError, LoraConfig, inject_lora, load_adapter, save_adapter
from lora_lightning.adapters.tensor_file import _DTYPES, is_finite, names_in, read_tensors, write_tensors

SHAPES = st.lists(st.integers(0, 5), max_size=3)


class Operations(TorchDispatchMode):
    """Notes which operations run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.dictionaries(st.text("ab.ü_0", min_size=1, max_size=4), st.tuples(SHAPES, st.sampled_from(list(_DTYPES)))))
def test_a_file_is_what_safetensors_writes(tmp_path, kinds):
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (shape, dtype) in kinds.items()}
    path = tmp_path / "it.safetensors"
    write_tensors(path, tensors)
    if len({value.dtype for value in tensors.values()}) <= 1:  # else the order is not laid down
        assert path.read_bytes() == save(tensors, metadata={"format": "pt"})
    assert set(names_in(path)) == set(tensors)
    for name, value in load_file(path).items():
        assert (value.dtype, value.shape) == (tensors[name].dtype, tensors[name].shape)
        assert torch.equal(value.double(), tensors[name].double())
    assert os.listdir(tmp_path) == [path.name]


def test_what_is_not_contiguous_is_written_in_order(tmp_path):
    value = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "it", {"a": value.t(), "b": value[:, 1:3]})
    read = load_file(tmp_path / "it")
    assert torch.equal(read["a"], value.t())
    assert torch.equal(read["b"], value[:, 1:3])


def test_others_may_read_it_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        write_tensors(tmp_path / "it", {"a": torch.ones(2)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "it").stat().st_mode) == 0o644


def test_a_dtype_that_the_format_lacks_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(AdapterError, match=r"a is of torch\.complex64"):
        write_tensors(tmp_path / "it", {"a": torch.ones(2, dtype=torch.complex64)})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_anywhere_is_seen(tmp_path, dtype, bad):
    for size in (1, 7, 64, 300):
        assert is_finite(torch.full((size,), torch.finfo(dtype).max, dtype=dtype))
        for place in range(0, size, 9):
            value = torch.randn(size).to(dtype)
            value[place] = bad
            assert not is_finite(value)
    write_tensors(tmp_path / "it", {"fine": torch.ones(2), "bad": value})
    with pytest.raises(AdapterError, match=r"not finite .* in bad$"):
        read_tensors(tmp_path / "it")
    (tmp_path / "it").write_bytes((tmp_path / "it").read_bytes()[:-1])
    for read in (read_tensors, names_in):
        with pytest.raises(AdapterError, match="cut off"):
            read(tmp_path / "it")


def test_saving_copies_nothing_and_loading_copies_once_and_draws_nothing(llama, tmp_path, shake):
    import copy

    base = copy.deepcopy(llama)
    inject_lora(llama, LoraConfig(r=4))
    shake(llama)
    with Operations() as saving:
        save_adapter(llama, tmp_path / "adapter")
    assert not {"clone", "copy_", "_to_copy"} & set(saving.seen)
    with Operations() as loading:
        load_adapter(base, tmp_path / "adapter")
    adapted = len(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert loading.seen.count("copy_") == adapted
    assert not {"rand", "randn", "uniform_", "normal_", "clone"} & set(loading.seen)
