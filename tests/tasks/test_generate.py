import random

import numpy as np
import pytest
import torch

from lora_lightning.tasks import CausalLM, ModelConfig, load_tokenizer
from lora_lightning.tasks.generate import stop_token_ids
from lora_lightning.tasks.stream import Sampling, stream_text

PROMPTS = ["the minister", "a small team has won the second game, and the new player", "hm"]


@pytest.fixture(params=["right", "left"])
def talker(request):
    """A tiny model whose random weights are sharp enough that texts depend on the whole prompt."""
    module = CausalLM("demo:tiny-llama")
    module.tokenizer.padding_side = request.param
    with torch.no_grad():
        for weight in module.model.model.layers.parameters():
            weight.mul_(2.0)
    return module


def one_by_one(module, prompt, length):
    """transformers' own greedy generation, without any padding."""
    ids = module.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    module.model.eval()
    output = module.model.generate(input_ids=ids, max_new_tokens=length, do_sample=False)
    return module.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_equals_hugging_face_one_by_one(talker):
    ours = talker.generate_text(PROMPTS, 12)
    assert ours == [one_by_one(talker, prompt, 12) for prompt in PROMPTS]
    assert len(set(ours)) == len(PROMPTS)


def by_hand(module, prompt, length, choose):
    """One forward of the whole text for each token, which `choose` takes from the logits of the last place: (V,)."""
    ids = module.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    start = ids.shape[1]
    module.model.eval()
    for _ in range(length):
        with torch.no_grad():
            token = choose(module.model(input_ids=ids).logits[0, -1])
        if token == module.tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return module.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


BROUGHT_ALONG = {"repetition_penalty": 1.3, "num_beams": 2, "do_sample": True, "min_p": 0.9, "top_k": 3}


def test_what_a_model_brings_along_does_not_count(talker):
    likeliest = [by_hand(talker, prompt, 12, lambda logits: logits.argmax().item()) for prompt in PROMPTS]
    own = talker.model.generation_config
    own.update(**BROUGHT_ALONG, suppress_tokens=talker.tokenizer(likeliest[0]).input_ids)
    told = own.to_dict()
    assert talker.generate_text(PROMPTS, 12) == likeliest
    for prompt, expected in zip(PROMPTS, likeliest, strict=True):
        assert stream_text(talker.model, talker.tokenizer, prompt, Sampling(12), print) == expected
    torch.manual_seed(7)
    drawn = by_hand(talker, PROMPTS[0], 12, lambda logits: (logits / 1.5).softmax(0).multinomial(1).item())
    assert stream_text(talker.model, talker.tokenizer, PROMPTS[0], Sampling(12, 1.5, seed=7), print) == drawn
    assert talker.model.generation_config is own
    assert own.to_dict() == told


def test_stops_at_the_end_of_the_turn(module):
    end = module.tokenizer.eos_token_id
    with torch.no_grad():  # the head is tied: make every position point at the end token
        module.model.lm_head.weight[:] = 0
        module.model.lm_head.weight[end] = 1
    lengths = []
    generate = module.model.generate
    module.model.generate = lambda **inputs: lengths.append(generate(**inputs).shape[1]) or generate(**inputs)
    module.model.model.norm.register_forward_hook(lambda *_: torch.ones(1, 1, 64))
    assert module.generate_text(["hello"], 30) == [""]
    assert lengths == [module.tokenizer("hello", return_tensors="pt").input_ids.shape[1] + 1]


def test_stop_tokens_of_a_template(module):
    assert stop_token_ids(module.model, module.tokenizer) == [module.tokenizer.eos_token_id]
    other = load_tokenizer(
        ModelConfig("demo:tiny-llama", chat_template="{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    )
    assert set(stop_token_ids(module.model, other)) == {
        other.eos_token_id,
        other.convert_tokens_to_ids("<|endoftext|>"),
    }
    other.chat_template = "{{ raise_exception('only user turns') }}"
    assert stop_token_ids(module.model, other) == [other.eos_token_id]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_leaves_no_trace(gradient_checkpointing):
    module = CausalLM({"name": "demo:tiny-llama", "gradient_checkpointing": gradient_checkpointing})
    module.model.model.layers[1].eval()  # modes may be mixed, and stay so
    modes = [part.training for part in module.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    module.generate_text(PROMPTS, 4)
    assert modes == [part.training for part in module.modules()]
    assert module.model.is_gradient_checkpointing is gradient_checkpointing
    assert torch.equal(states[0], torch.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()
    assert all(weight.grad is None for weight in module.parameters())


def test_no_prompts(module):
    assert module.generate_text([]) == []
