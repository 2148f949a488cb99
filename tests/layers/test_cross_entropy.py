"""Against torch's cross-entropy of whole logits, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lora_lightning.layers import row_losses
from lora_lightning.layers.cross_entropy import HeadLora, linear_cross_entropy
from lora_lightning.layers.row_losses import Form

K, D, V, R = 7, 6, 19, 2
FORMS = [Form(), Form(0.3), Form(1.0, 2.0), Form(-1.7, 0.8)]


def problem(dtype=torch.float64, trained=("x", "weight", "bias", "a", "b"), rows=K):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (rows, D), "weight": (V, D), "bias": (V,), "a": (R, D), "b": (V, R)}
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        tensors[name] = values.requires_grad_(name in trained)
    return tensors, torch.randint(0, V, (rows,), generator=generator)


def ours(tensors, targets, bias=True, lora=True, dropout=0.0, **options):
    return linear_cross_entropy(
        tensors["x"],
        tensors["weight"],
        tensors["bias"] if bias else None,
        targets,
        lora=HeadLora(tensors["a"], tensors["b"], 1.5, dropout) if lora else None,
        **options,
    )


def whole(tensors, targets, bias=True, lora=True, form=FORMS[0], label_smoothing=0.0):
    weight = tensors["weight"] + 1.5 * tensors["b"] @ tensors["a"] if lora else tensors["weight"]
    logits = form.scale * (tensors["x"] @ weight.T + (tensors["bias"] if bias else 0))
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    return functional.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def gradients(losses_K, weights_K, tensors):
    trained = [tensor for tensor in tensors.values() if tensor.requires_grad]
    return torch.autograd.grad((losses_K * weights_K).sum(), trained, allow_unused=True)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    bias=st.booleans(),
    lora=st.booleans(),
    rows_at_once=st.integers(1, K + 1),
    weights=st.lists(st.floats(-2, 2), min_size=K, max_size=K) | st.just([0.7] * K) | st.just([0.0] * K),
)
def test_equals_whole_logits(form, label_smoothing, bias, lora, rows_at_once, weights):
    tensors, targets = problem()
    options = {"form": form, "label_smoothing": label_smoothing, "bias": bias, "lora": lora}
    losses, expected = ours(tensors, targets, rows_at_once=rows_at_once, **options), whole(tensors, targets, **options)
    torch.testing.assert_close(losses, expected, atol=1e-12, rtol=0)
    weights_K = torch.tensor(weights, dtype=torch.float64)
    found = gradients(losses, weights_K, tensors)
    torch.testing.assert_close(found, gradients(expected, weights_K, tensors), atol=1e-12, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(ours(tensors, targets, rows_at_once=rows_at_once, **options), expected.detach())


@pytest.mark.parametrize("trained", [("x",), ("weight",), ("bias",), ("a", "b"), ("b",), ("x", "a"), ("x", "bias")])
def test_what_does_not_train_gets_no_gradient(trained):
    tensors, targets = problem(trained=trained)
    for weights_K in (torch.ones(K), torch.arange(K)):
        found = gradients(ours(tensors, targets), weights_K, tensors)
        torch.testing.assert_close(found, gradients(whole(tensors, targets), weights_K, tensors), atol=1e-12, rtol=0)


def test_a_frozen_head_keeps_nothing_but_the_gradient_of_its_input():
    tensors, targets = problem(trained=("x",))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        ours(tensors, targets, lora=False)
    assert kept == [(K, D)]


def test_no_graph_without_something_that_trains():
    tensors, targets = problem(trained=())
    assert ours(tensors, targets).grad_fn is None


def test_no_rows():
    tensors, targets = problem(rows=0)
    losses = ours(tensors, targets)
    assert losses.shape == (0,)
    for gradient, tensor in zip(gradients(losses, torch.ones(0), tensors), tensors.values(), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_one_row():
    tensors, targets = problem(rows=1)
    torch.testing.assert_close(ours(tensors, targets), whole(tensors, targets))


def test_large_logits():
    tensors, targets = problem()
    with torch.no_grad():
        tensors["x"] *= 1e4
    torch.testing.assert_close(ours(tensors, targets), whole(tensors, targets))
    assert all(gradient.isfinite().all() for gradient in gradients(ours(tensors, targets), torch.ones(K), tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision(dtype, form):
    """As near to float64 as the rounding of inputs' dtype lets it be; losses and sums are float32."""
    tensors, targets = problem(dtype)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    losses, expected = ours(tensors, targets, form=form, rows_at_once=3), whole(exact, targets, form=form)
    assert losses.dtype == torch.float32
    digits = torch.finfo(dtype).eps
    torch.testing.assert_close(losses.double(), expected, atol=16 * digits, rtol=4 * digits)
    found = gradients(losses, torch.ones(K), tensors)
    for gradient, wanted in zip(found, gradients(expected, torch.ones(K), exact), strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - wanted).norm() < 8 * digits * wanted.norm()


def test_autocast():
    tensors, targets = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses = ours(tensors, targets)
    rounded, _ = problem(torch.bfloat16)
    torch.testing.assert_close(losses, ours(rounded, targets), atol=0.05, rtol=0.02)
    for gradient in gradients(losses, torch.ones(K), tensors):
        assert gradient.dtype == torch.float32
    assert not torch.equal(losses, ours(tensors, targets))


def test_dropout_of_the_adapter():
    tensors, targets = problem()
    torch.manual_seed(5)
    losses = ours(tensors, targets, dropout=0.5)
    torch.manual_seed(5)
    kept = functional.dropout(tensors["x"], 0.5)
    logits = tensors["x"] @ tensors["weight"].T + tensors["bias"] + 1.5 * kept @ tensors["a"].T @ tensors["b"].T
    expected = functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, expected, atol=1e-12, rtol=0)
    weights_K = torch.arange(K)
    found, wanted = gradients(losses, weights_K, tensors), gradients(expected, weights_K, tensors)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_backward_twice_but_no_second_derivative():
    tensors, targets = problem()
    losses = ours(tensors, targets)
    first = torch.autograd.grad(losses.sum(), tensors["x"], retain_graph=True)
    assert torch.equal(torch.autograd.grad(losses.sum(), tensors["x"])[0], first[0])
    with pytest.raises(RuntimeError, match=r"can be differentiated once.*create_graph"):
        torch.autograd.grad(ours(tensors, targets).sum(), tensors["x"], create_graph=True)


def test_transforms_and_compilation():
    tensors, targets = problem()

    def loss(weight):
        return ours(tensors | {"weight": weight}, targets).sum()

    (expected,) = torch.autograd.grad(loss(tensors["weight"]), tensors["weight"])
    torch.testing.assert_close(torch.func.grad(loss)(tensors["weight"].detach()), expected)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(tensors["weight"]), tensors["weight"])[0], expected)


def test_wrong_targets_are_refused():
    tensors, targets = problem()
    for wrong in (V, -100):
        with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
            ours(tensors, targets.fill_(wrong))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_liger", [False, True])
def test_on_a_gpu(dtype, form, with_liger, monkeypatch):
    if with_liger:
        pytest.importorskip("liger_kernel")
    else:
        monkeypatch.setattr(row_losses, "_liger", lambda: None)
    tensors, targets = problem(dtype)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    moved = {name: tensor.detach().cuda().requires_grad_() for name, tensor in tensors.items()}
    options = {"form": form, "label_smoothing": 0.1}
    losses, expected = ours(moved, targets.cuda(), rows_at_once=3, **options), whole(exact, targets, **options)
    digits = max(torch.finfo(dtype).eps, 1e-4)  # float32 products may be those of TF32
    torch.testing.assert_close(losses.cpu().double(), expected, atol=16 * digits, rtol=4 * digits)
    for weights_K in (torch.ones(K), torch.arange(K)):
        found = gradients(ours(moved, targets.cuda(), **options), weights_K.cuda(), moved)
        for gradient, wanted in zip(found, gradients(expected, weights_K, exact), strict=True):
            assert (gradient.cpu().double() - wanted).norm() < 8 * digits * wanted.norm()
        expected = whole(exact, targets, **options)
    assert (row_losses._liger() is not None) == with_liger
