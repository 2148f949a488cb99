import random

import numpy as np
import pytest
import torch

from lora_lightning.tasks import CausalLM, ModelConfig, load_tokenizer
from lora_lightning.tasks.generate import stop_token_ids

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
