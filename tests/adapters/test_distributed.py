"""The distributed form, in one process: what is read is what was written."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lightning.adapters.distributed import is_distributed, read_distributed, write_distributed

NAMES = st.text("ab._", min_size=1, max_size=5)
TENSORS = st.lists(st.integers(0, 3), max_size=3).map(lambda shape: torch.randn(shape))
CHECKPOINTS = st.fixed_dictionaries(
    {
        "state_dict": st.dictionaries(NAMES, TENSORS, max_size=4),
        "optimizer_states": st.lists(
            st.fixed_dictionaries(
                {
                    "state": st.dictionaries(NAMES, st.dictionaries(NAMES, TENSORS | st.integers(), max_size=3)),
                    "param_groups": st.lists(st.dictionaries(NAMES, st.floats(allow_nan=False) | st.booleans())),
                }
            ),
            max_size=2,
        ),
        "epoch": st.integers(),
        "callbacks": st.dictionaries(NAMES, TENSORS | st.none(), max_size=2),
    }
)


def _equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


@settings(max_examples=25, deadline=None)
@given(CHECKPOINTS)
def test_what_is_read_is_what_was_written(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_distributed(checkpoint, folder)
    assert is_distributed(folder)
    assert _equal(read_distributed(folder), checkpoint)
