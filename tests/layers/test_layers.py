"""The change of class: what an adapted layer keeps, and what must not be changed."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lora_lightning.errors import LoraConfigError
from lora_lightning.layers import LoraEmbedding, LoraLayer, LoraLinear, adapt, is_linear, kind_of, restore, why_not


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class NamedLinear(nn.Linear):
    """A subclass without a forward of its own."""


class ScaledEmbedding(nn.Embedding):
    embed_scale = 3.0

    def forward(self, x):
        return super().forward(x) * self.embed_scale


def _adapted(layer, r=3, scaling=2.0, dropout=0.0):
    adapt(layer, r, scaling * r, scaling, dropout)
    for parameter in (layer.lora_A, layer.lora_B):
        nn.init.normal_(parameter)
    return layer


def _conv1d():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(5, 6)
    nn.init.normal_(layer.bias)
    return layer


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(2, 4, 6)),
    "no bias": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(4, 6)),
    "subclass": (lambda: NamedLinear(6, 5), lambda: torch.randn(2, 4, 6)),
    "conv1d": (_conv1d, lambda: torch.randn(2, 4, 6)),
    "embedding": (lambda: nn.Embedding(6, 5, padding_idx=0), lambda: torch.randint(0, 6, (2, 4))),
    "scaled embedding": (lambda: ScaledEmbedding(6, 5), lambda: torch.randint(0, 6, (2, 4))),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_output_equals_the_plain_layer_with_the_merged_weight(kind):
    make, draw = LAYERS[kind]
    layer, x = make().double(), draw()
    x = x.double() if x.is_floating_point() else x
    merged = copy.deepcopy(layer)
    _adapted(layer)
    with torch.no_grad():
        merged.weight += layer.lora_weight_delta()
    torch.testing.assert_close(layer(x), merged(x), rtol=1e-10, atol=1e-10)


def test_a_forward_of_its_own_keeps_running_below_the_update():
    layer, x = ScaledLinear(6, 5), torch.randn(3, 6)
    base = layer(x)
    _adapted(layer)
    torch.testing.assert_close(layer(x), base + 2.0 * (x @ layer.lora_A.t() @ layer.lora_B.t()))


@pytest.mark.parametrize("kind", LAYERS)
def test_pickles_deep_copies_and_is_restored_to_the_bit(kind):
    make, draw = LAYERS[kind]
    layer, x = make(), draw()
    plain, before = type(layer), layer(x)
    _adapted(layer)
    assert isinstance(layer, LoraLayer)
    assert isinstance(layer, plain)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert torch.equal(twin(x), layer(x))
    layer.lora_enabled = False
    assert torch.equal(layer(x), before)
    restore(layer)
    assert type(layer) is plain
    assert torch.equal(layer(x), before)
    assert not [name for name in vars(layer) if name.startswith("lora")]
    assert {name for name, _ in layer.named_parameters()} <= {"weight", "bias"}


def test_hooks_and_ties_survive():
    layer, calls = nn.Linear(4, 4), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    weight = layer.weight
    _adapted(layer)(torch.randn(2, 4))
    assert calls == [1]
    assert layer.weight is weight


def test_dropout_only_in_train_mode_and_only_on_the_adapters_way():
    layer, x = _adapted(nn.Linear(32, 8), dropout=0.5), torch.randn(16, 32)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_adapters_are_float32_beside_a_half_precision_weight():
    assert _adapted(nn.Linear(4, 4).bfloat16()).lora_A.dtype == torch.float32
    assert _adapted(nn.Linear(4, 4).double()).lora_A.dtype == torch.float64


def test_kinds():
    assert kind_of(nn.Linear(2, 2)) is LoraLinear
    assert kind_of(nn.Embedding(2, 2)) is LoraEmbedding
    assert kind_of(nn.LayerNorm(2)) is None
    assert is_linear(_conv1d())
    assert not is_linear(nn.Embedding(2, 2))
    assert is_linear(_adapted(nn.Linear(2, 2)))


def test_a_class_changed_since_is_not_overwritten():
    layer = _adapted(nn.Linear(2, 2))
    layer.__class__ = type("FSDPLoraLinear", (LoraLinear,), {})
    with pytest.raises(TypeError, match="FSDPLoraLinear"):
        restore(layer)


def test_hazards_are_named_with_the_remedy():
    lazy = nn.LazyLinear(3)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.warns(FutureWarning):
        normed = nn.utils.weight_norm(nn.Linear(2, 2))
    replaced = nn.Linear(2, 2)
    replaced.forward = lambda x: x
    assert "run one batch" in why_not(lazy)
    assert "remove_parametrizations" in why_not(parametrized)
    assert "remove_weight_norm" in why_not(normed)
    assert "replaced on the instance" in why_not(replaced)
    spectral = nn.utils.spectral_norm(nn.Linear(2, 2))
    pruned = prune.l1_unstructured(nn.Linear(2, 2), "weight", amount=1)
    for layer, remedy in (
        (spectral, lambda: nn.utils.remove_spectral_norm(spectral)),
        (pruned, lambda: prune.remove(pruned, "weight")),
    ):
        assert "remove_spectral_norm(layer) or torch.nn.utils.prune.remove(layer, 'weight')" in why_not(layer)
        remedy()
        assert why_not(layer) is None
    assert why_not(nn.Linear(2, 2)) is None


def test_accelerates_hook_is_put_over_the_new_class():
    from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module

    class Double(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    add_hook_to_module(layer, Double())
    assert why_not(layer) is None
    _adapted(layer)
    expected = 2 * (nn.functional.linear(x, layer.weight, layer.bias) + 2.0 * (x @ layer.lora_A.t() @ layer.lora_B.t()))
    torch.testing.assert_close(layer(x), expected)
    restore(layer)
    torch.testing.assert_close(layer(x), 2 * nn.functional.linear(x, layer.weight, layer.bias))
    offloaded = nn.Linear(4, 3)
    add_hook_to_module(offloaded, AlignDevicesHook(execution_device="cpu", offload=True))
    assert "offload" in why_not(offloaded)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", [nn.Linear, NamedLinear, nn.Embedding])
def test_an_input_by_its_name(kind, variant):
    layer, x = kind(5, 6), torch.tensor([1, 2]) if kind is nn.Embedding else torch.randn(2, 5)
    adapt(layer, 2, 2, 1.0, 0.0, variant)
    for parameter in layer.lora_own.values():
        nn.init.normal_(parameter)
    assert torch.equal(layer(input=x), layer(x))
    layer.lora_enabled = False
    assert torch.equal(layer(input=x), layer(x))


class Router(nn.Linear):
    def forward(self, x):
        logits = super().forward(x)
        return logits, logits.argmax(-1)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_an_output_that_is_no_tensor_is_refused_with_the_remedy(variant):
    layer = Router(5, 6)
    adapt(layer, 2, 2, 1.0, 0.0, variant)
    with pytest.raises(LoraConfigError, match=r"Router gives a tuple .* exclude_modules"):
        layer(torch.randn(2, 5))
