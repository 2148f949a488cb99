"""Adapted convolutions against the mathematics in float64 (dense and ungrouped) and against PEFT's layers and files."""

import copy
import io
import pickle
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_lightning import (
    AdapterError,
    LoraConfig,
    LoraConfigError,
    inject_lora,
    load_adapter,
    lora_disabled,
    lora_state_dict,
    merge_lora,
    save_adapter,
    unload_lora,
)
from lora_lightning.injection.report import LoraReport
from lora_lightning.injection.state import load_lora_state
from lora_lightning.layers import LoraLayer

CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
EXACT = {"rtol": 1e-10, "atol": 1e-10}
SHAPES = st.fixed_dictionaries(
    {
        "dims": st.integers(1, 3),
        "groups": st.sampled_from([1, 1, 2, 3]),
        "inner": st.integers(1, 2),
        "outer": st.integers(1, 2),
        "rank": st.integers(1, 2),
        "kernel": st.sampled_from([1, 2, 3]),
        "stride": st.sampled_from([1, 2]),
        "dilation": st.sampled_from([1, 2]),
        "padding": st.sampled_from([0, 1, 2, "same", "valid"]),
        "mode": st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
        "bias": st.booleans(),
        "batched": st.booleans(),
    }
)


class Causal(nn.Conv1d):
    """Sees nothing ahead."""

    def forward(self, x):
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class Standardised(nn.Conv2d):
    """Of each output's weights it takes the mean away and divides by the deviation (as in BiT)."""

    def forward(self, input):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(input, w, self.bias, self.stride, self.padding)


class Masked(nn.Conv2d):
    """Multiplies its weight with a mask inside what nn.Conv2d calls (as PixelCNN's)."""

    def _conv_forward(self, input, weight, bias):
        mask = torch.ones_like(weight)
        mask[..., -1, :] = 0
        return super()._conv_forward(input, weight * mask, bias)


OWN = {
    "causal": (lambda: Causal(4, 6, 3, dilation=2), (2, 4, 9)),
    "standardised": (lambda: Standardised(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "masked": (lambda: Masked(4, 6, 3, bias=False), (2, 4, 5, 5)),
}


def _layer(case):
    stride = 1 if case["padding"] == "same" else case["stride"]
    mode = case["mode"]
    if case["dims"] == 3 and mode == "reflect":
        mode = "replicate"
    layer = CLASSES[case["dims"]](
        case["groups"] * case["inner"],
        case["groups"] * case["outer"],
        case["kernel"],
        stride=stride,
        padding=case["padding"],
        dilation=case["dilation"],
        groups=case["groups"],
        bias=case["bias"],
        padding_mode=mode,
    ).double()
    batch = (2,) if case["batched"] or mode != "zeros" else ()
    return layer, torch.randn(*batch, layer.in_channels, *[6] * case["dims"], dtype=torch.float64)


def _injected(model, **fields):
    """Adapters that do something in every target, without what is warned of such small layers."""
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": False, **fields}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rank larger")
        report = inject_lora(model, LoraConfig(**fields))
    for name, p in model.named_parameters():
        if name.endswith("lora_magnitude"):
            p.data.mul_(1 + 0.3 * torch.rand_like(p))
    return report


def _dense_update(layer):
    """``s · B A`` as the weight of a convolution without groups, ``(out, in, k…)``, by loops."""
    a, b, groups = layer.lora_A.detach(), layer.lora_B.detach(), layer.groups
    update = torch.zeros(layer.out_channels, layer.in_channels, *layer.kernel_size, dtype=a.dtype)
    for o in range(layer.out_channels):
        group = o // (layer.out_channels // groups)
        for j in range(b.shape[1]):
            update[o] += layer.lora_scaling * b[o, j].flatten()[0] * a[group * b.shape[1] + j]
    return update


def _dense_weight(layer):
    """The base weight as one without groups: zeros outside the blocks."""
    groups, weight = layer.groups, layer.weight.detach()
    dense = torch.zeros(layer.out_channels, layer.in_channels, *layer.kernel_size, dtype=weight.dtype)
    outs, ins = layer.out_channels // groups, layer.in_channels // groups
    for g in range(groups):
        dense[g * outs : (g + 1) * outs, g * ins : (g + 1) * ins] = weight[g * outs : (g + 1) * outs]
    return dense


def _plain(layer, weight, bias):
    """A convolution of torch's own with another weight and no groups, otherwise as ``layer``."""
    plain = CLASSES[len(layer.kernel_size)](
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        bias=bias is not None,
        padding_mode=layer.padding_mode,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias)
    return plain


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from([{}, {"use_rslora": True}]))
def test_outputs_are_those_of_the_dense_formula_and_of_the_merged_layer(case, fields):
    torch.manual_seed(0)
    layer, x = _layer(case)
    model = nn.Sequential(layer)
    _injected(model, r=case["groups"] * case["rank"], **fields)
    out = model(x)
    wanted = _plain(layer, _dense_weight(layer) + _dense_update(layer), layer.bias)(x)
    torch.testing.assert_close(out, wanted, **EXACT)
    if layer.groups > 1:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(AdapterError, match=rf"0 has groups={layer.groups}"):
            merge_lora(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model(x), out)
    else:
        merge_lora(model)
        assert type(model[0]) is CLASSES[case["dims"]]
        torch.testing.assert_close(model(x), out, **EXACT)


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_dora_is_the_dense_formula_with_its_gradients(case):
    torch.manual_seed(0)
    layer, x = _layer(case)
    model = nn.Sequential(layer)
    _injected(model, r=case["groups"] * case["rank"], use_dora=True)
    model(x).square().sum().backward()
    own = {name: p.grad for name, p in layer.lora_own.items()}
    copies = {name: p.detach().clone().requires_grad_() for name, p in layer.lora_own.items()}
    dense = _dense_weight(layer)
    norm = (dense + _dense_update(layer)).flatten(1).norm(dim=1)
    outs, ranks, update = layer.out_channels // layer.groups, copies["lora_B"].shape[1], []
    for o in range(layer.out_channels):
        rows = copies["lora_A"][o // outs * ranks : (o // outs + 1) * ranks]
        update.append(torch.tensordot(copies["lora_B"][o].flatten(), rows, 1))
    ratio = (copies["lora_magnitude"].flatten() / norm).view(-1, *[1] * (dense.dim() - 1))
    weight = ratio * (dense + layer.lora_scaling * torch.stack(update))
    plain = _plain(layer, dense, layer.bias)
    wanted = torch.func.functional_call(plain, {"weight": weight}, (x,))
    torch.testing.assert_close(model(x), wanted, **EXACT)
    wanted.square().sum().backward()
    for name, p in copies.items():
        torch.testing.assert_close(own[name], p.grad, rtol=1e-9, atol=1e-9)
    if layer.groups == 1:
        out = model(x)
        merge_lora(model)
        torch.testing.assert_close(model(x), out, **EXACT)


class Net(nn.Module):
    def __init__(self, dims, groups):
        super().__init__()
        kind = CLASSES[dims]
        self.conv = kind(4, 8, 3, padding=1, stride=2)
        self.conv_in_groups = kind(8, 8, 2, padding="same", groups=groups, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.conv_in_groups(torch.tanh(self.conv(x))).flatten(2).mean(2))


CASES = [
    (1, 1, {}),
    (2, 2, {"use_rslora": True, "rank_pattern": {"conv": 2}, "alpha_pattern": {"conv_in_groups": 3}}),
    (3, 4, {}),
    (1, 1, {"use_dora": True}),
    (2, 1, {"use_dora": True, "rank_pattern": {"conv": 6}}),
    (3, 1, {"use_dora": True}),
    (2, 2, {"lora_bias": True}),
    (2, 1, {"bias": "lora_only"}),
]


@pytest.mark.parametrize(("dims", "groups", "fields"), CASES)
def test_peft_reads_ours_and_we_read_theirs(dims, groups, fields, tmp_path, shake):
    base = Net(dims, groups).double()
    ours, again, x = copy.deepcopy(base), copy.deepcopy(base), torch.randn(2, 4, *[5] * dims, dtype=torch.float64)
    _injected(ours, target_modules=["conv", "conv_in_groups", "head"], **fields)
    shake(ours)
    folder = save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(theirs(x), ours(x), **EXACT)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(again, tmp_path / "theirs", trainable=True)
    assert torch.equal(again(x), ours(x))
    if groups == 1 and not fields.get("use_rslora"):
        merged = theirs.merge_and_unload()
        merge_lora(ours)
        for name, value in merged.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, **EXACT)


def test_first_values_are_peft_s_in_kind():
    net = Net(2, 2)
    inject_lora(net, LoraConfig(r=4, target_modules=["conv"], use_dora=True))
    assert not net.conv.lora_B.any()
    bound = 1 / (4 * 9) ** 0.5  # uniform within one over the root of the fan-in, as nn.Conv2d's own
    assert 0.9 * bound < net.conv.lora_A.abs().max() <= bound
    assert net.conv.lora_magnitude.shape == (1, 8, 1, 1)
    torch.testing.assert_close(net.conv.lora_magnitude.flatten(), net.conv.weight.flatten(1).norm(dim=1))


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_a_forward_of_its_own_sees_the_adapted_weight(kind, fields):
    make, shape = OWN[kind]
    model, x = nn.Sequential(make()).double(), torch.randn(shape, dtype=torch.float64)
    _injected(model, **fields)
    with torch.no_grad():
        for p in model[0].lora_own.values():
            p.add_(0.1 * torch.randn_like(p))
    out = model(x)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model[0].lora_own.values())
    assert "weight" not in vars(model[0])
    if fields.get("lora_bias") and model[0].bias is None:
        with pytest.raises(AdapterError, match="no bias"):
            merge_lora(model)
        return
    merge_lora(model)
    torch.testing.assert_close(model(x), out.detach(), **EXACT)


@pytest.mark.parametrize("make", [lambda: Causal(4, 6, 3), lambda: nn.Conv1d(4, 6, 3, padding=1)])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}])
def test_dropout_is_on_the_way_to_the_update_alone(make, fields):
    model, x = nn.Sequential(make()).double(), torch.randn(3, 4, 9, dtype=torch.float64)
    _injected(model, lora_dropout=0.4, **fields)
    layer = model[0]
    base = copy.deepcopy(model)
    unload_lora(base)
    torch.manual_seed(5)
    out = model(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.4)
    merged = copy.deepcopy(model.eval())
    merge_lora(merged)
    if fields:  # what is scaled by m/‖…‖ is the whole sum
        c = (merged[0].weight / (layer.weight + layer.lora_weight_delta()))[:, :1, :1]
        with torch.no_grad():
            base[0].weight.mul_(c)
    wanted = base(x) + merged(dropped) - base(dropped)
    torch.testing.assert_close(out, wanted, **EXACT)
    assert not torch.allclose(out, model(x))


def test_whisper_whose_forward_asks_its_convolutions_for_their_strides():
    """PEFT's wrappers have none, so that its Whisper with adapted convolutions does not run at all."""
    from transformers import WhisperConfig, WhisperModel

    sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    ffn = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_source_positions": 10, "max_target_positions": 10}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = WhisperModel(WhisperConfig(vocab_size=50, d_model=16, num_mel_bins=8, **sides, **ffn, **special)).eval()
    asked = {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": torch.tensor([[1, 2]])}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["conv1", "conv2"]))
    with pytest.raises(AttributeError, match="stride"):
        theirs(**asked)
    base = model(**asked).last_hidden_state
    _injected(model, target_modules=["conv1", "conv2", "q_proj"], use_dora=True)
    out = model(**asked).last_hidden_state
    assert not torch.allclose(out, base, atol=1e-2)
    merge_lora(model)
    torch.testing.assert_close(model(**asked).last_hidden_state, out, rtol=1e-4, atol=1e-4)


def test_memory_format_and_half_precision():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    _injected(model)
    out = model(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous()), out, rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(model)
    unload_lora(half)
    half.bfloat16()
    _injected(half)
    assert half[0].lora_A.dtype == torch.float32
    halved = half(x.bfloat16())
    assert halved.dtype == torch.bfloat16
    torch.testing.assert_close(halved.float(), out, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), out, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_it_is_an_adapter_as_others_are(fields, shake):
    net, x = Net(2, 2), torch.randn(2, 4, 5, 5)
    net.conv = Standardised(4, 8, 3, padding=1, stride=2)
    before, base_out = copy.deepcopy(net.state_dict()), net(x)
    report = _injected(net, target_modules=["conv", "conv_in_groups"], **fields)
    assert isinstance(report, LoraReport)
    assert [(row.kind, row.shape) for row in report.rows] == [("Conv", (4, 8)), ("Conv", (8, 8))]
    shake(net)
    out = net(x)
    trains = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trains == set(lora_state_dict(net))
    assert report.trainable_parameters == sum(p.numel() for p in lora_state_dict(net).values())
    with lora_disabled(net):
        assert torch.equal(net(x), base_out)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), out)
        unload_lora(twin)
    kept = io.BytesIO()
    torch.save(lora_state_dict(net), kept)
    kept.seek(0)
    fresh = copy.deepcopy(net)
    unload_lora(fresh)
    _injected(fresh, target_modules=["conv", "conv_in_groups"], **fields)
    load_lora_state(fresh, torch.load(kept), "a checkpoint")
    assert torch.equal(fresh(x), out)
    unload_lora(net)
    assert [type(net.conv), type(net.conv_in_groups)] == [Standardised, nn.Conv2d]
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net(x), base_out)


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_on_cuda(fields):
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), nn.Conv2d(8, 8, 3, groups=2)).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    _injected(model, target_modules=["0", "1"], **fields)
    wanted = model(x)
    model.cuda().to(memory_format=torch.channels_last)
    x = x.cuda().contiguous(memory_format=torch.channels_last)
    out = model(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.cpu(), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).double().cpu(), wanted, rtol=0.1, atol=0.1)


def test_all_linear_means_no_convolution():
    net = Net(1, 1)
    assert [row.name for row in inject_lora(net, LoraConfig(r=2)).rows] == ["head"]
    assert not isinstance(net.conv, LoraLayer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 5}, r"conv_in_groups cannot be adapted: its 4 groups share the rank.*such as 4"),
        ({"r": 8, "init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal' is not for a Conv1d"),
        ({"r": 8, "init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not for a Conv1d.*true, false, gauss"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(fields, message):
    net = Net(1, 4)
    with pytest.raises(LoraConfigError, match=message):
        inject_lora(net, LoraConfig(target_modules=["conv_in_groups"], **fields))
    assert not any(isinstance(part, LoraLayer) for part in net.modules())


def test_an_own_forward_in_groups_is_refused():
    with pytest.raises(LoraConfigError, match="forward of its own and groups=2"):
        inject_lora(nn.Sequential(Causal(4, 6, 3, groups=2)), LoraConfig(r=2, target_modules=["0"]))


def test_the_warning_of_wide_ranks_counts_the_kernel():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_lora(nn.Sequential(nn.Conv2d(3, 64, 7)), LoraConfig(r=32, target_modules=["0"]))
    with pytest.warns(UserWarning, match="rank larger"):
        inject_lora(nn.Sequential(nn.Conv2d(3, 64, 3)), LoraConfig(r=32, target_modules=["0"]))


def test_one_scale_is_for_linear_layers_alone(tmp_path):
    model = nn.Sequential(nn.Conv1d(4, 4, 3))
    _injected(model)
    with pytest.raises(AdapterError, match=r"not base_model\.model\.0\.lora_A\.weight"):
        save_adapter(model, tmp_path, fold_scaling=True)


def test_peft_s_norms_of_grouped_convolutions_are_told(tmp_path):
    base, x = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), torch.randn(2, 4, 7)
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"DoRA's norms of a convolution in groups.*Layers: 0\."):
        load_adapter(base, tmp_path)
    assert not torch.allclose(base(x), theirs(x), atol=1e-3)


def test_where_peft_s_outputs_differ_is_told_on_both_ways(tmp_path):
    base = nn.Sequential(nn.Conv1d(4, 4, 3, padding="same", padding_mode="circular"))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match=r"neither the dilation nor the padding_mode.*not those that PEFT gave.*: 0\."):
        load_adapter(base, tmp_path / "theirs")
    x = torch.randn(2, 4, 7)
    assert not torch.allclose(base(x), theirs(x), atol=1e-4)
    torch.testing.assert_close(base(x)[..., 1:-1], theirs(x)[..., 1:-1], rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="PEFT will give other outputs"):
        save_adapter(base, tmp_path / "ours")
