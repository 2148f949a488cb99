"""Layers computed together give what each gives by itself, and step back where anyone could notice."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lora_lightning import LoraConfig, inject_lora, lora_disabled, unload_lora
from lora_lightning.injection.together import compute_apart
from lora_lightning.layers.gated import LoraGated
from lora_lightning.layers.group import LoraGroup, dissolve
from lora_lightning.layers.norm import LoraNorm
from lora_lightning.layers.rotary import LoraRotary

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "head_dim": 8,
    "pad_token_id": 0,
}


def _model(kind="llama", dropout=0.0, seed=0, **options):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | options)))
    inject_lora(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout), seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def _apart(model):
    """A copy in which every layer computes for itself."""
    model = copy.deepcopy(model)
    compute_apart(model)
    for module in model.modules():
        dissolve(module)
    assert not any(isinstance(module, (LoraGated, LoraNorm, LoraRotary)) for module in model.modules())
    assert not any(getattr(module, "lora_group", None) for module in model.modules())
    return model


def _ids(rows=3, length=11):
    return torch.randint(1, 60, (rows, length), generator=torch.Generator().manual_seed(1))


def _gradients(model, ids=None, **inputs):
    model.zero_grad()
    ids = _ids() if ids is None else ids
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    logits.float().square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def _assert_equal(model, other, **tolerances):
    torch.manual_seed(0)  # for the dropout of the base
    logits, gradients = _gradients(model)
    torch.manual_seed(0)
    expected, wanted = _gradients(other)
    torch.testing.assert_close(logits, expected, **tolerances)
    assert gradients.keys() == wanted.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], wanted[name], msg=name, **tolerances)


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "gemma", "gemma2", "mistral", "phi", "cohere", "opt", "olmo2"]
)
def test_outputs_and_gradients_are_those_of_each_layer_by_itself(kind):
    model = _model(kind).double()
    _assert_equal(model, _apart(model), rtol=1e-8, atol=1e-10)


def test_what_is_computed_together_in_a_llama():
    model = _model()
    block = model.model.layers[0]
    attention = block.self_attn
    assert attention.q_proj.lora_group is attention.k_proj.lora_group is attention.v_proj.lora_group
    assert attention.q_proj.lora_group.members == (attention.q_proj, attention.k_proj, attention.v_proj)
    assert attention.o_proj.lora_group is None
    assert isinstance(block.mlp, LoraGated)
    assert isinstance(block.mlp, type(_apart(model).model.layers[0].mlp))
    assert isinstance(block.input_layernorm, LoraNorm)
    assert isinstance(model.model.norm, LoraNorm)
    assert isinstance(attention, LoraRotary)


def test_float32_outputs_are_the_base_models_to_the_bit_before_training():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    before = model(_ids()).logits
    inject_lora(model, LoraConfig(r=4), seed=0)
    assert torch.equal(model(_ids()).logits, before)
    with torch.inference_mode():
        assert torch.equal(model(_ids()).logits, before)
    with lora_disabled(model):
        assert torch.equal(model(_ids()).logits, before)
    unload_lora(model)
    assert torch.equal(model(_ids()).logits, before)
    assert type(model.model.layers[0].mlp).__module__.startswith("transformers.")
    assert type(model.model.norm).__module__.startswith("transformers.")
    assert type(model.model.layers[0].self_attn).__module__.startswith("transformers.")


def test_a_rotation_put_in_the_place_of_the_one_that_was_read_is_used(monkeypatch):
    from transformers.models.llama import modeling_llama

    model = _model()
    before = model(_ids()).logits
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * 0, k))
    assert not torch.allclose(model(_ids()).logits, before)
    torch.testing.assert_close(model(_ids()).logits, _apart(model)(_ids()).logits)


def test_bfloat16_outputs_are_the_base_models_to_the_bit_before_training():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).bfloat16()
    before = model(_ids()).logits
    inject_lora(model, LoraConfig(r=4), seed=0)
    assert torch.equal(model(_ids()).logits, before)


def test_dropout_is_in_force_and_is_drawn_once_for_a_group():
    model = _model(dropout=0.1)
    torch.manual_seed(0)
    first, _ = _gradients(model)
    second, _ = _gradients(model)
    torch.manual_seed(0)
    again, _ = _gradients(model)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(_ids()).logits, model(_ids()).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_repeats_the_same_dropout(reentrant):
    model = _model(dropout=0.1)
    torch.manual_seed(0)
    logits, gradients = _gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    torch.manual_seed(0)
    again, wanted = _gradients(model)
    assert torch.equal(logits, again)
    for name in gradients:
        torch.testing.assert_close(gradients[name], wanted[name], msg=name)


def test_a_hook_that_changes_an_input_is_heeded():
    model = _model()
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        changed = _apart(model)
        for one in (model, changed):
            layer = getattr(one.model.layers[0].self_attn, name)
            layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        _assert_equal(model, changed)
        getattr(attention, name)._forward_pre_hooks.clear()


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj", "act_fn"])
@pytest.mark.parametrize("kind", ["forward", "full_backward", "global"])
def test_hooks_within_a_gated_block_are_called(part, kind):
    model = _model()
    layer = getattr(model.model.layers[0].mlp, part)
    seen = []

    def note(module, *_):
        if module is layer:
            seen.append(module)

    if kind == "forward":
        handle = layer.register_forward_hook(note)
    elif kind == "full_backward":
        handle = layer.register_full_backward_hook(note)
    else:
        handle = nn.modules.module.register_module_forward_hook(note)
    _gradients(model)
    handle.remove()
    assert len(seen) == 1


def test_a_gated_block_takes_its_input_by_name_and_says_what_is_wrong_as_its_class_does():
    block = _model().model.layers[0].mlp
    x = torch.randn(2, 3, 32)
    assert torch.equal(block(x=x), block(x))
    with pytest.raises(TypeError):
        block(x, x)
    with pytest.raises(TypeError):
        block(y=x)
    with pytest.raises(TypeError):
        block()


def test_an_activation_replaced_by_another_is_used():
    model = _model()
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()
    _assert_equal(model, _apart(model))


def test_layers_of_which_some_are_switched_off_frozen_or_dropped_differently():
    model = _model()
    first, second = (layer.self_attn for layer in model.model.layers)
    first.k_proj.lora_enabled = False
    second.v_proj.lora_B.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.lora_enabled = False
    model.model.layers[1].mlp.gate_proj.lora_A.requires_grad_(False)
    _assert_equal(model, _apart(model))


def test_a_layer_called_by_itself_or_on_another_input_computes_for_itself():
    model = _model()
    attention, alone = model.model.layers[0].self_attn, _apart(model).model.layers[0].self_attn
    x, y = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    torch.testing.assert_close(attention.k_proj(x), alone.k_proj(x))
    attention.q_proj(x)
    torch.testing.assert_close(attention.k_proj(y), alone.k_proj(y))
    attention.q_proj(x)
    x.mul_(2)
    torch.testing.assert_close(attention.k_proj(x), alone.k_proj(x))


def test_cross_attention_with_checkpointing():
    config = AutoConfig.for_model(
        "bart", d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=60, dropout=0.0, attention_dropout=0.0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    inject_lora(model, LoraConfig(r=2, lora_dropout=0.1), seed=0)
    model.train()
    results = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model.zero_grad()
        model(input_ids=_ids(), decoder_input_ids=_ids(3, 7), use_cache=False).last_hidden_state.sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in results[0].items():
        torch.testing.assert_close(grad, results[1][name], msg=name)


def test_copies_and_pickles_stay_together_and_hold_nothing_of_a_forward():
    model = _model()
    attention = model.model.layers[0].self_attn
    attention.q_proj(torch.randn(2, 5, 32))  # the others' outputs wait
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        group = other.model.layers[0].self_attn.q_proj.lora_group
        assert isinstance(group, LoraGroup)
        assert group.members[1] is other.model.layers[0].self_attn.k_proj
        assert group._waiting is None
        _assert_equal(other, _apart(model))


def test_torch_func_and_compile_go_through_a_whole_model():
    model = _model().eval()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values):
        return torch.func.functional_call(model, values, (_ids(),), {"use_cache": False}).logits.square().mean()

    got = torch.func.grad(loss)(trained)
    _, expected = _gradients(model)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], msg=name)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(_ids(), use_cache=False).logits, model(_ids(), use_cache=False).logits)


def test_autocast_gives_what_layers_by_themselves_give():
    model = _model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _assert_equal(model, _apart(model), rtol=2e-2, atol=2e-3)


def test_a_layer_with_two_parents_is_in_no_group():
    class Two(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), k

        def forward(self, x):
            return self.q(x) + self.k(x)

    shared = nn.Linear(4, 4)
    model = nn.Sequential(Two(shared), Two(shared))
    inject_lora(model, LoraConfig(r=2), seed=0)
    assert shared.lora_group is None


def test_fewer_bytes_are_saved_than_by_layers_by_themselves():
    def saved(model):
        total = {}
        known = {p.data_ptr() for p in model.parameters()}

        def note(tensor):
            if tensor.data_ptr() not in known:
                total[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = model(_ids(8, 40), use_cache=False).logits
        del out
        return sum(total.values())

    model = _model(dropout=0.05)
    assert saved(model) < 0.9 * saved(_apart(model))


def test_checkpoint_of_a_single_block_by_hand():
    model = _model(dropout=0.1)
    block, x = model.model.layers[0].mlp, torch.randn(2, 5, 32, requires_grad=True)
    torch.manual_seed(0)
    (plain,) = torch.autograd.grad(block(x).square().sum(), x)
    torch.manual_seed(0)
    (again,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, again)


@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.k_proj", "mlp", "mlp.down_proj", "input_layernorm"])
def test_outputs_may_be_written_into(part):
    model = _model()
    layer = model.model.layers[0].get_submodule(part)
    other = _apart(model).model.layers[0].get_submodule(part)
    x = torch.randn(2, 5, 48 if part == "mlp.down_proj" else 32, requires_grad=True)
    results = []
    for one in (layer, other):
        y = one(x)
        y += 1
        y *= 2
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def _replaced(model, monkeypatch, name, forward):
    """A class of the model's modeling file is given another forward, as libraries of kernels do."""
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(getattr(modeling_llama, name), "forward", forward)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("name", "part"), [("LlamaMLP", "mlp"), ("LlamaRMSNorm", "input_layernorm")])
def test_a_class_that_is_given_another_forward_is_heeded(monkeypatch, before, name, part):
    _model()  # read before
    model = None if before else _model()
    _replaced(model, monkeypatch, name, lambda self, x: x * 3)
    model = model or _model()
    x = torch.randn(2, 3, 32, requires_grad=True)
    assert torch.equal(model.model.layers[0].get_submodule(part)(x), x * 3)


def test_attention_that_is_given_another_forward_is_heeded(monkeypatch):
    model = _model()
    _replaced(model, monkeypatch, "LlamaAttention", lambda self, hidden_states, **_: (hidden_states * 3, None))
    torch.testing.assert_close(model(_ids()).logits, _apart(model)(_ids()).logits)


def test_global_names_put_in_the_place_of_those_that_attention_looks_up_are_used(monkeypatch):
    from transformers.models.llama import modeling_llama

    model = _model()
    model(_ids())

    class Nothing(dict):
        def get_interface(self, *_):
            raise ZeroDivisionError

        __getitem__ = get_interface

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Nothing())
    with pytest.raises(ZeroDivisionError):
        model(_ids())


def test_a_rotation_replaced_before_the_first_forward_is_used(monkeypatch):
    from transformers.models.llama import modeling_llama

    from lora_lightning.layers.rotary import original

    original.cache_clear()
    model = _model()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * 0, k))
    torch.testing.assert_close(model(_ids()).logits, _apart(model)(_ids()).logits)


def test_an_activation_whose_forward_is_replaced_is_used():
    block = _model().model.layers[0].mlp
    block.act_fn.forward = torch.zeros_like
    assert not block(torch.randn(2, 3, 32)).any()


@pytest.mark.parametrize("part", ["mlp", "input_layernorm", "self_attn.q_proj"])
@pytest.mark.parametrize("shape", [(32,), (0, 32), (2, 0, 32), (1, 1, 1, 32)])
def test_inputs_of_any_number_of_dimensions_and_none(part, shape):
    model = _model(dropout=0.1).eval()
    results = []
    for one in (model, _apart(model)):
        x = torch.ones(shape, requires_grad=True)
        y = one.model.layers[0].get_submodule(part)(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_blocks_compile_whole():
    torch._dynamo.reset()
    model = _model()
    expected = _gradients(_apart(model))
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(_gradients(model), expected)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("forward", [True, False])
def test_backward_under_autocast_has_the_dtypes_of_forward(forward, dora):
    results = []
    for backward in (True, False):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).train()
        inject_lora(model, LoraConfig(r=4, lora_dropout=0.1, use_dora=dora), seed=0)
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward):
            loss = model(_ids(), use_cache=False).logits.float().square().mean()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward):
            loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(grad.dtype == torch.float32 for grad in results[0].values())
    torch.testing.assert_close(*results, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("dora", [False, True])
def test_selective_activation_checkpointing_keeps_products_that_nobody_writes_into(dora):
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).train()
    inject_lora(model, LoraConfig(r=4, use_dora=dora), seed=0)
    for part in ("mlp", "self_attn.q_proj", "input_layernorm"):
        module, x = model.model.layers[0].get_submodule(part), torch.randn(2, 5, 32, requires_grad=True)
        inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
        kept = checkpoint(
            module, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(products)
        )
        torch.testing.assert_close(
            torch.autograd.grad(kept.square().sum(), inputs), torch.autograd.grad(module(x).square().sum(), inputs)
        )


def test_one_who_watches_all_calls_sees_those_within_a_gated_block(monkeypatch):
    model, seen, call = _model(), [], nn.Module.__call__

    def watched(self, *args, **kwargs):
        seen.append(self)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", watched)
    block = model.model.layers[0].mlp
    block(torch.randn(2, 3, 32))
    assert seen == [block, block.gate_proj, block.act_fn, block.up_proj, block.down_proj]
