"""Several adapters of one model: each by itself, their sums, swapping, files, and what others do to the model."""

import copy
import pickle
import warnings

import lightning as L
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_lightning import (
    AdapterError,
    Adapters,
    LoraCallback,
    LoraConfig,
    inject_lora,
    load_adapter,
    lora_disabled,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    save_adapter,
    unload_lora,
)
from lora_lightning.injection.state import injected_roots, lora_layers

CONFIGS = {
    "math": {"r": 4, "lora_alpha": 8},
    "chat": {
        "r": 2,
        "target_modules": ["q_proj", "embed_tokens"],
        "use_rslora": True,
        "rank_pattern": {r"layers\.1\..*": 3},
    },
    "dora": {"r": 3, "use_dora": True, "target_modules": ["v_proj", "down_proj"]},
    "head": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
}
TOKENS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, and for each adapter its folder and the logits that its own model has."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    found = {}
    for number, (name, fields) in enumerate(CONFIGS.items()):
        model = copy.deepcopy(base)
        inject_lora(model, LoraConfig(**fields), seed=number)
        with torch.no_grad():
            for parameter in lora_parameters(model).values():
                parameter.add_((0.1 + 0.02 * number) * torch.randn(parameter.shape))
            logits = model(TOKENS).logits
        found[name] = (save_adapter(model, tmp_path_factory.mktemp("made") / name), logits)
    return base, found


@pytest.fixture
def llama(made):
    return copy.deepcopy(made[0])


@pytest.fixture
def folders(made):
    return made[1]


@pytest.fixture
def tokens():
    return TOKENS


@pytest.fixture
def adapters(llama, folders):
    found = Adapters(llama)
    for name, (folder, _) in folders.items():
        found.load(name, folder)
    return found


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, weights):
    now = model.state_dict()
    return now.keys() == weights.keys() and all(torch.equal(now[name], value) for name, value in weights.items())


def test_each_is_what_it_is_alone_and_none_is_the_base(llama, tokens, folders):
    before, trained = weights_of(llama), {name for name, p in llama.named_parameters() if p.requires_grad}
    logits, classes = llama(tokens).logits, [type(m) for m in llama.modules()]
    adapters = Adapters(llama)
    for name, (folder, _) in folders.items():
        adapters.load(name, folder)
    assert adapters.active == ()
    assert adapters.names == tuple(CONFIGS)
    for name in [*CONFIGS, *reversed(CONFIGS)]:
        adapters.set(name)
        assert adapters.active == (name,)
        assert torch.equal(llama(tokens).logits, folders[name][1])
        assert not any(p.requires_grad for p in llama.parameters())
        with lora_disabled(llama):
            assert torch.equal(llama(tokens).logits, logits)
    adapters.disable()
    assert adapters.active == ()
    assert not injected_roots(llama)
    assert same(llama, before)
    assert [type(m) for m in llama.modules()] == classes
    assert {name for name, p in llama.named_parameters() if p.requires_grad} <= trained


def test_several_at_once_are_the_sum_as_in_peft(llama, tokens, folders, adapters):
    base = copy.deepcopy(llama)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, folders["math"][0], adapter_name="math")
        theirs.load_adapter(folders["chat"][0], "chat")
        theirs.load_adapter(folders["head"][0], "head")
    theirs.base_model.set_adapter(["math", "chat"])
    theirs.eval()
    adapters.set("math", "chat")
    assert adapters.active == ("math", "chat")
    torch.testing.assert_close(llama(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    adapters.set("math", "head")
    theirs.base_model.set_adapter(["math", "head"])
    torch.testing.assert_close(llama(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    logits = llama(tokens).logits
    merge_lora(llama)
    torch.testing.assert_close(llama(tokens).logits, logits, atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0.5, 8), st.booleans()), min_size=2, max_size=4))
def test_a_sum_is_exact_in_float64(members):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Conv1d(4, 8, 2, groups=2)).double().eval()
    inputs = {"0": torch.randn(2, 5, dtype=torch.float64), "2": torch.randn(2, 4, 7, dtype=torch.float64)}
    adapters, deltas = Adapters(model), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, (r, alpha, both) in enumerate(members):
            targets = ["0", "2"] if both else ["0"]
            config = LoraConfig(r=2 * r, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
            adapters.add(str(number), config, seed=number)
            deltas.append({name: layer.lora_delta(inputs[name]).detach() for name, layer in lora_layers(model)})
        adapters.set(*adapters.names)
    for name, layer in lora_layers(model):
        total = sum(each[name] for each in deltas if name in each)
        torch.testing.assert_close(layer.lora_delta(inputs[name]), total, rtol=1e-10, atol=1e-10)
        assert layer.lora_r == sum(2 * r for (r, _, both) in members if both or name == "0")
        assert layer.lora_scaling == 1.0


def test_what_cannot_be_summed_is_refused_and_nothing_changes(llama, tokens, folders, adapters):
    adapters.set("chat")
    with pytest.raises(AdapterError, match="dora cannot be combined with others: DoRA"):
        adapters.set("chat", "dora")
    adapters.load("other", folders["head"][0])
    with pytest.raises(AdapterError, match="other and head both have values of their own for"):
        adapters.set("head", "other")
    with pytest.raises(AdapterError, match=r"no adapter 'mth' \(did you mean math\?\); there are: math, chat"):
        adapters.set("chat", "mth")
    with pytest.raises(AdapterError, match="in the sum once"):
        adapters.set("chat", "chat")
    assert adapters.active == ("chat",)
    assert torch.equal(llama(tokens).logits, folders["chat"][1])


def test_the_one_that_trains_is_the_only_one_and_goes_on_with_its_parameters(llama, tokens, folders, adapters):
    adapters.train("math")
    own = lora_parameters(llama)
    assert own
    assert not any("embed" in name for name in own)
    optimizer = torch.optim.SGD(own.values(), lr=0.1)
    llama(tokens, labels=tokens).loss.backward()
    optimizer.step()
    moved = llama(tokens).logits.detach()
    assert not torch.equal(moved, folders["math"][1])
    adapters.train("head")
    assert {name for name in lora_parameters(llama) if "lora" not in name} == {"lm_head.weight", "model.norm.weight"}
    llama(tokens, labels=tokens).loss.backward()
    torch.optim.SGD(lora_parameters(llama).values(), lr=0.1).step()
    head = llama(tokens).logits.detach()
    adapters.set("math")
    assert lora_parameters(llama) == {}
    assert torch.equal(llama(tokens).logits, moved)
    adapters.train("math")
    assert all(one is own[name] for name, one in lora_parameters(llama).items())
    optimizer.zero_grad()
    llama(tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert not torch.equal(llama(tokens).logits, moved)
    adapters.set("head")
    assert torch.equal(llama(tokens).logits, head)
    adapters.set("chat")
    assert torch.equal(llama(tokens).logits, folders["chat"][1])


def test_nothing_is_bound_to_inference_by_being_put_in_there(llama, tokens, folders):
    adapters = Adapters(llama)
    with torch.inference_mode():
        adapters.load("math", folders["math"][0])
        adapters.load("head", folders["head"][0])
        adapters.set("math", "head")
        adapters.add_weighted("both", {"math": 1.0, "head": 1.0}, how="cat")
        assert torch.equal(llama(tokens).logits, llama(tokens).logits)
    for name in adapters:
        adapters.train(name)
        llama(tokens, labels=tokens).loss.backward()
        assert all(p.grad is not None for p in lora_parameters(llama).values())


def test_loading_while_one_trains_leaves_it_training(llama, tokens, folders):
    inject_lora(llama, LoraConfig(r=4), seed=3)
    adapters = Adapters(llama, name="mine")
    before = lora_parameters(llama)
    llama(tokens, labels=tokens).loss.backward()
    grads = {name: p.grad for name, p in before.items()}
    adapters.load("math", folders["math"][0])
    assert adapters.active == ("mine",)
    after = lora_parameters(llama)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] and after[name].grad is grads[name] for name in before)
    with pytest.raises(AdapterError, match="no folder"):
        adapters.load("none", folders["math"][0] / "nowhere")
    with pytest.raises(AdapterError, match=r"a folder's name too.*got '../up'"):
        adapters.load("../up", folders["math"][0])
    assert adapters.names == ("mine", "math")
    assert lora_parameters(llama).keys() == before.keys()


def test_files_are_pefts_and_come_back(llama, tokens, folders, adapters, tmp_path):
    adapters.add("default", LoraConfig(r=2, init_lora_weights=False, target_modules=["k_proj"]))
    own = llama(tokens).logits.detach()
    adapters.add_weighted("both", {"math": 0.5, "chat": -1.0}, how="cat")
    adapters.set("both")
    both = llama(tokens).logits.detach()
    written = adapters.save(tmp_path / "all")
    assert adapters.active == ("both",)
    assert {path.name for path in written} == {"all", *CONFIGS, "both"}
    with pytest.raises(AdapterError, match="overwrite=True"):
        adapters.save(tmp_path / "all", ["math"])
    adapters.disable()
    base = copy.deepcopy(llama)
    adapters.disable()
    again = Adapters(copy.deepcopy(llama))
    assert set(again.load_all(tmp_path / "all")) == set(adapters.names)
    expected = {name: logits for name, (_, logits) in folders.items()} | {"default": own, "both": both}
    for name in again:
        again.set(name)
        assert torch.equal(again.model(tokens).logits, expected[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "all").eval()
        for name in ("math", "chat", "dora", "head", "both"):
            theirs.load_adapter(tmp_path / "all" / name, name)
    for name, logits in expected.items():
        theirs.set_adapter(name)
        torch.testing.assert_close(theirs(tokens).logits, logits, atol=2e-6, rtol=1e-5)


def test_deleting(llama, tokens, folders, adapters):
    adapters.set("math", "chat")
    adapters.delete("math")
    assert adapters.active == ("chat",)
    torch.testing.assert_close(llama(tokens).logits, folders["chat"][1], atol=1e-6, rtol=1e-5)
    adapters.delete("chat")
    assert adapters.active == ()
    assert "chat" not in adapters
    assert len(adapters) == 2
    with pytest.raises(AdapterError, match="no adapter 'math'; there are: dora, head"):
        adapters.delete("math")


def test_what_others_do_to_the_model_is_noticed(llama, tokens, folders, adapters, tmp_path):
    base = llama(tokens).logits
    adapters.set("head")
    unload_lora(llama)
    assert adapters.active == ()
    assert torch.equal(llama(tokens).logits, base)
    adapters.set("chat")
    assert torch.equal(llama(tokens).logits, folders["chat"][1])
    unload_lora(llama)
    load_adapter(llama, folders["math"][0])
    with pytest.raises(AdapterError, match="has an adapter that none of these"):
        adapters.set("chat")
    unload_lora(llama)
    before = weights_of(llama)
    adapters.set("math", "chat", "head")
    unload_lora(llama)
    assert same(llama, before)
    adapters.set("math")
    merge_lora(llama)
    for _ in range(2):
        with pytest.raises(AdapterError, match="the base is another one"):
            adapters.set("chat")
    with pytest.raises(AdapterError, match="the base is another one"), adapters.rows(["chat", "chat"]):
        pass
    adapters.save(tmp_path, ["chat"])
    with pytest.warns(UserWarning, match="not the one this adapter was trained on"):
        Adapters(llama).load("chat", tmp_path / "chat")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["copy", "pickle"])
def test_copies_are_copies(copied, llama, tokens, folders, adapters):
    adapters.set("math")
    twin = copied(adapters)
    twin.set("chat")
    assert torch.equal(twin.model(tokens).logits, folders["chat"][1])
    assert torch.equal(llama(tokens).logits, folders["math"][1])
    twin.set("math")
    with torch.no_grad():
        next(lora_layers(twin.model))[1].lora_B.zero_()
    assert torch.equal(llama(tokens).logits, folders["math"][1])


def test_half_precision_bases_keep_whole_adapters(llama, tokens, folders):
    llama.bfloat16()
    adapters = Adapters(llama)
    for name in ("math", "chat"):
        adapters.load(name, folders[name][0])
    adapters.set("math", "chat")
    assert {p.dtype for p in lora_state_dict(llama).values()} == {torch.float32}
    assert llama(tokens).logits.dtype == torch.bfloat16


# ---- swapping


def test_swapping_changes_values_and_compiles_nothing_anew(llama, tokens, shake, tmp_path):
    llama.model.layers = llama.model.layers[:1]
    others = {}
    for name, fields in {
        "first": {"r": 4, "lora_alpha": 8},
        "smaller": {"r": 2, "lora_alpha": 6},
        "patterns": {"r": 5, "rank_pattern": {"q_proj": 8, "v_proj": 1}, "alpha_pattern": {"down_proj": 3}},
        "fewer": {"r": 8, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    }.items():
        model = copy.deepcopy(llama)
        inject_lora(model, LoraConfig(**fields))
        shake(model, 0.2)
        others[name] = (save_adapter(model, tmp_path / name), model(tokens).logits.detach())
    adapters = Adapters(llama)
    adapters.load("slot", others["first"][0], room=8)
    adapters.set("slot")
    parameters = lora_state_dict(llama)
    torch._dynamo.reset()
    compiled = torch.compile(llama, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens).logits, others["first"][1], atol=1e-5, rtol=1e-5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name in [*others, "smaller", "first"]:
                adapters.swap("slot", others[name][0])
                torch.testing.assert_close(compiled(tokens).logits, others[name][1], atol=1e-5, rtol=1e-5)
    assert all(now.data_ptr() == parameters[name].data_ptr() for name, now in lora_state_dict(llama).items())
    saved = save_adapter(llama, tmp_path / "again")
    unload_lora(llama)
    load_adapter(llama, saved)
    torch.testing.assert_close(llama(tokens).logits, others["first"][1], atol=1e-5, rtol=1e-5)


def test_swapping_heads_dora_and_what_is_not_in_the_model(llama, tokens, folders, adapters, tmp_path):
    for name in ("dora", "head"):
        adapters.disable()
        model = copy.deepcopy(llama)
        load_adapter(model, folders[name][0], trainable=True)
        with torch.no_grad():
            for parameter in lora_parameters(model).values():
                parameter.mul_(1.5)
        other, logits = save_adapter(model, tmp_path / f"{name}2"), model(tokens).logits.detach()
        adapters.set(name)
        adapters.swap(name, other)
        torch.testing.assert_close(llama(tokens).logits, logits, atol=1e-5, rtol=1e-5)
        adapters.set("math")
        adapters.swap(name, folders[name][0])
        assert torch.equal(llama(tokens).logits, folders["math"][1])
        adapters.set(name)
        torch.testing.assert_close(llama(tokens).logits, folders[name][1], atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_not_swapped(llama, tokens, folders, adapters, tmp_path):
    model = copy.deepcopy(llama)
    inject_lora(model, LoraConfig(r=2, target_modules=["o_proj"]))
    narrow = save_adapter(model, tmp_path / "narrow")
    for active in ("math", "chat"):
        adapters.set(active)
        with pytest.raises(AdapterError, match=r"has what the adapter in place has not: .*embed_tokens"):
            adapters.swap("math", folders["chat"][0])
        with pytest.raises(AdapterError, match="use_dora: True in place, False in the folder"):
            adapters.swap("dora", folders["math"][0])
        with pytest.raises(AdapterError, match=r"lacks what the adapter in place trains in full: .*lm_head"):
            adapters.swap("head", narrow)
        assert torch.equal(llama(tokens).logits, folders[active][1])
    adapters.set("math", "chat")
    with pytest.raises(AdapterError, match="part of a sum"):
        adapters.swap("math", folders["math"][0])


def test_a_larger_rank_needs_room(llama, folders, shake, tmp_path):
    model = copy.deepcopy(llama)
    inject_lora(model, LoraConfig(r=9))
    large = save_adapter(model, tmp_path / "large")
    adapters = Adapters(llama)
    adapters.load("math", folders["math"][0])
    with pytest.raises(AdapterError, match=r"room=…(.|\n)*q_proj has room for r=4, got r=9(.|\n)*more layers"):
        adapters.swap("math", large)
    adapters.load("roomy", folders["math"][0], room=16)
    adapters.swap("roomy", large)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(0, 4), st.floats(0.25, 16), st.floats(0.25, 16), st.booleans())
def test_swapping_is_exact_up_to_rounding(r, more, alpha, slot, grouped):
    import tempfile

    groups = 2 if grouped else 1
    r, more = r * groups, more * groups
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 6), nn.Conv1d(4, 8, 3, groups=groups)).double().eval()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        one = copy.deepcopy(model)
        inject_lora(one, LoraConfig(r=r, lora_alpha=alpha, target_modules=["0", "1"], init_lora_weights=False))
        save_adapter(one, folder)
        adapters = Adapters(model)
        adapters.add("slot", LoraConfig(r=r + more, lora_alpha=slot, target_modules=["0", "1"]))
        adapters.swap("slot", folder)
        torch.testing.assert_close(model(x), one(x), rtol=1e-10, atol=1e-10)


# ---- in a LightningModule


class Speaker(L.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.head = nn.Linear(64, 3)

    def forward(self, batch):
        return self.head(self.model(batch).logits)

    def training_step(self, batch, _):
        return self(batch).square().mean()

    def predict_step(self, batch, _):
        return self.model(batch).logits

    def configure_optimizers(self):
        return torch.optim.SGD(lora_parameters(self).values(), lr=0.5)


def trainer(**options):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", logger=False, **quiet, **options)


@pytest.mark.filterwarnings("ignore")
def test_prediction_and_training_with_a_trainer(llama, tokens, folders, tmp_path):
    batches = torch.utils.data.DataLoader(tokens, batch_size=2)
    adapters = Adapters(Speaker(llama))
    for name in ("math", "chat"):
        adapters.load(name, folders[name][0])
    for name in ("math", "chat", "math"):
        adapters.set(name)
        (logits,) = trainer().predict(adapters.model, batches)
        torch.testing.assert_close(logits, folders[name][1], atol=1e-6, rtol=1e-5)
    with adapters.rows(["chat", "math"]):
        (logits,) = trainer().predict(adapters.model, batches)
    torch.testing.assert_close(logits[0], folders["chat"][1][0], atol=1e-5, rtol=1e-5)
    adapters.train("math")
    callback = LoraCallback(adapters.config("math"))
    trainer(max_steps=1, callbacks=[callback], default_root_dir=tmp_path).fit(adapters.model, batches)
    llama.eval()
    assert adapters.active == ("math",)
    moved = llama(tokens).logits.detach()
    assert not torch.equal(moved, folders["math"][1])
    adapters.set("chat")
    assert torch.equal(llama(tokens).logits, folders["chat"][1])
    adapters.set("math")
    assert torch.equal(llama(tokens).logits, moved)


@pytest.mark.filterwarnings("ignore")
def test_heads_around_the_model_belong_to_their_adapters(llama, tokens, shake, tmp_path):
    module = Speaker(llama).eval()
    adapters, expected = Adapters(module), {}
    base = module(tokens)
    for number, name in enumerate(("one", "two")):
        adapters.add(name, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["head"]), seed=number)
        shake(module, 0.1 + 0.1 * number)
        expected[name] = module(tokens).detach()
    adapters.save(tmp_path)
    adapters.set("one")
    assert torch.equal(module(tokens), expected["one"])
    with adapters.rows(["two", "__base__"]):
        rows = module(tokens)
    torch.testing.assert_close(rows, torch.stack([expected["two"][0], base[1]]), atol=1e-5, rtol=1e-5)
    adapters.swap("one", tmp_path / "two")
    torch.testing.assert_close(module(tokens), expected["two"], atol=1e-6, rtol=1e-5)
    adapters.disable()
    again = Adapters(copy.deepcopy(module))
    again.load_all(tmp_path)
    again.set("two")
    assert torch.equal(again.model(tokens), expected["two"])


@pytest.mark.gpu
def test_adapters_at_rest_are_on_the_cpu(llama, tokens, folders):
    llama.cuda()
    for offload, place in ((True, "cpu"), (False, "cuda")):
        adapters = Adapters(llama, offload=offload)
        for name in ("math", "chat"):
            adapters.load(name, folders[name][0])
        adapters.set("math")
        own = lora_parameters(llama) or dict(llama.named_parameters())
        assert {p.device.type for p in own.values()} == {"cuda"}
        parameters = [p for _, layer in lora_layers(llama) for p in layer.lora_own.values()]
        with torch.no_grad():
            torch.testing.assert_close(llama(tokens.cuda()).logits.cpu(), folders["math"][1], atol=1e-2, rtol=1e-2)
            adapters.set("math", "chat")
            with adapters.rows(["chat", "math"]):
                logits = llama(tokens.cuda()).logits.cpu()
            torch.testing.assert_close(logits[1], folders["math"][1][1], atol=1e-2, rtol=1e-2)
        assert {p.device.type for p in parameters} == {place}
        adapters.disable()
