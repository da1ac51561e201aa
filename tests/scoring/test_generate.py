"""Written text follows the model's argmax token by token, whatever else is in the batch."""

import json

import pytest
import torch
import transformers as hf
from rich.console import Console

from tests.support.hub_folders import make_tokenizer
from tests.support.models import build
from zofo.errors import UserError
from zofo.models.adapters import create_adapter
from zofo.models.loading import load_model
from zofo.saved.artifact import Artifact, BaseSpec
from zofo.scoring.generate import Writer
from zofo.scoring.predict import predict, table_of_texts
from zofo.tasks.rows import Table
from zofo.tasks.spec import TaskSpec

QUIET = Console(quiet=True)
WORDS = ["the film is", "a dull, lifeless and badly acted mess", "great", "What is the capital of"]


def lively(model, seed=0):
    """Add noise to the weights, so that an untrained model does not repeat one token for ever."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.3 * noise).to(parameter))
    return model


@pytest.fixture
def written_by(decoder_folder):
    def make(adapter):
        model, tokenizer = load_model(decoder_folder)
        if adapter is not None:
            model = create_adapter(model, adapter, tokenizer=tokenizer, num_virtual_tokens=4)
        return lively(model), tokenizer

    return make


@torch.no_grad()
def by_argmax(model, prompt, count):
    """Return the most likely next tokens.

    Each token comes from a forward pass over the whole text before it.
    """
    model.eval()
    ids = list(prompt)
    for _ in range(count):
        batch = torch.tensor([ids])
        logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def prompts_of(tokenizer):
    """Return prompts of four lengths, two of which occur twice."""
    texts = [*WORDS, "a film is", "terrible"]
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("adapter", [None, "lora", "prefix", "prompt"])
def test_a_text_is_the_argmax_token_by_token(written_by, adapter):
    model, tokenizer = written_by(adapter)
    prompts = prompts_of(tokenizer)
    assert len({len(prompt) for prompt in prompts}) > 2
    expected = [by_argmax(model, prompt, 6) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)
    ends = tokenizer.eos_token_id
    expected = [t[: t.index(ends)] if ends in t else t for t in expected]
    model.train()
    for batch_size in (1, 4, 100):
        written = Writer(tokenizer, 6)(model, prompts, batch_size=batch_size)
        assert list(written.texts) == [
            tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected
        ]
    assert model.training


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_padding_on_the_left_suits_models_with_learnt_positions(architecture, written_by):
    """The positions of a prompt with padding on the left start at its first real token."""
    model = lively(build(architecture, "lora"))
    _, tokenizer = written_by(None)
    prompts = [[5, 9, 11, 3, 17], [7], [23, 4]]
    expected = [by_argmax(model, prompt, 5) for prompt in prompts]
    assert all(0 not in tokens for tokens in expected)
    assert list(Writer(tokenizer, 5)(model, prompts).texts) == [
        tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected
    ]


CHAT = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}"


@pytest.mark.parametrize("tools", [None, [{"name": "weather"}]])
def test_an_answer_ends_with_the_turn(written_by, tools):
    """The template's end of a turn is not the end token that the base knows."""
    model, tokenizer = written_by(None)
    messages = [{"role": "user", "content": "the film is"}]
    prompt = f"{json.dumps(tools) if tools else ''}the film is"
    expected = by_argmax(model, tokenizer(prompt)["input_ids"], 12)
    place = next(i for i in range(3, 12) if expected[i] not in expected[:i])
    end = tokenizer.convert_ids_to_tokens(expected[place])
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = (
        CHAT + "{% if m.role == 'assistant' %}" + end + "{% endif %}{% endfor %}"
    )
    artifact = Artifact(model, tokenizer, BaseSpec("tiny"), "none", None, ())
    row = {"messages": messages, "tools": tools}
    spec = TaskSpec(name="chat", train="a.jsonl")
    (found,) = predict(artifact, spec, Table([(1, row)], "a.jsonl", {}), max_new_tokens=12)
    assert found["prediction"] == tokenizer.decode(expected[:place], skip_special_tokens=True)


def test_a_prompt_that_leaves_no_room_is_refused():
    tokenizer = make_tokenizer(pad_token="<eos>")
    sizes = {"vocab_size": len(tokenizer), "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, n_positions=16))
    artifact = Artifact(model, tokenizer, BaseSpec("tiny"), "none", None, ())
    spec = TaskSpec(name="completion", train="a.jsonl")
    table = table_of_texts(spec, ["the film is"])
    with pytest.raises(UserError, match=r"positions; shorten it, or lower max_new_tokens"):
        next(predict(artifact, spec, table))
