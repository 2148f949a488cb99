import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_lightning.layers.row_losses import Form
from lora_lightning.tasks.probe import form_of, probe

CPU = torch.device("cpu")
scales = st.floats(1e-3, 50) | st.floats(-50, -1e-3)


@given(scale=scales, vocabulary=st.integers(2, 300))
def test_finds_a_scale(scale, vocabulary):
    sent = probe(vocabulary, CPU)
    form = form_of(sent, sent * scale, Form())
    assert form.scale == pytest.approx(scale, rel=1e-12)
    assert form.softcap is None


@given(scale=st.floats(0.05, 5) | st.floats(-5, -0.05), cap=st.floats(0.5, 100), after=st.booleans())
def test_finds_a_soft_cap(scale, cap, after):
    """Whether the scale is before the cap or after it."""
    sent = probe(300, CPU)
    came = cap * torch.tanh(sent / cap) * scale if after else cap * torch.tanh(sent * scale / cap)
    form = form_of(sent, came, Form())
    torch.testing.assert_close(form.of(sent), came, rtol=1e-11, atol=0)
    assert form.softcap == pytest.approx(cap * abs(scale) if after else cap, rel=1e-11)


@given(column=st.integers(0, 99), row=st.integers(0, 1), factor=st.sampled_from([0.0, 1.001, -1.0, torch.nan, 1e30]))
def test_any_number_that_is_off_is_seen(column, row, factor):
    sent = probe(100, CPU)
    came = sent.clone()
    came[0, row, column] *= factor
    assert form_of(sent, came, Form()) is None
    assert form_of(sent, came, Form(2.0)) is None


def test_what_is_no_form():
    sent = probe(50, CPU)
    for came in (sent + 1, sent.abs(), sent.relu(), sent.log_softmax(-1), sent.clamp(-100, 100), sent.flip(1)):
        assert form_of(sent, came, Form()) is None
    for came in (None, sent[..., 1:], sent[:, :1], sent.transpose(0, 1), sent.long()):
        assert form_of(sent, came, Form()) is None


def test_rounding_on_the_way():
    sent = probe(50, CPU)
    assert form_of(sent, sent.float() / 13, Form()).scale == pytest.approx(1 / 13, rel=1e-6)
    assert form_of(sent, sent.bfloat16(), Form()) == Form()
    assert form_of(sent, (sent / 13).bfloat16(), Form()) is None  # a scale cannot be read from that
    assert form_of(sent, (sent / 13).bfloat16(), Form(1 / 13)) == Form(1 / 13)
