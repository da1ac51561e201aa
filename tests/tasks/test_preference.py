"""Preference pairs: their layouts, the loss by its formula, and bad rows."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tests.support.hub_folders import CHAT_TEMPLATE, make_tokenizer
from tests.support.models import enliven
from zofo.errors import UserError
from zofo.models.loading import load_model
from zofo.tasks.encode import Encoder
from zofo.tasks.preference import (
    Compared,
    PreferenceOptions,
    encode_pairs,
    read_pairs,
)
from zofo.tasks.rows import Table
from zofo.trainer.pairs import PairSource

ROWS = [
    {"prompt": "the film is", "chosen": " great and fine", "rejected": " a mess"},
    {"prompt": "What is it?", "chosen": " good", "rejected": " a dull, lifeless thing"},
    {"prompt": "It was", "chosen": " an actor", "rejected": " badly acted and dull"},
]


@pytest.fixture(scope="module")
def loaded(decoder_folder):
    """A lively model in float64, and its tokenizer."""
    model, tokenizer = load_model(decoder_folder)
    enliven(model)
    return model.double().eval(), tokenizer


def table(*rows, source="pairs.jsonl"):
    return Table(list(enumerate(rows, start=1)), source, {})


def written(pair):
    """The text of both answers, with what the model learns in brackets."""
    sides = (pair.chosen, pair.rejected)
    return ["".join(f"[{t}]" if learnt else t for t, learnt in side.segments) for side in sides]


def by_hand(model, tokenizer, text, answer):
    """The log-likelihood of an answer and its end token, one token after another."""
    ids = tokenizer(text)["input_ids"]
    tail = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    total = 0.0
    for token in tail:
        logits = model(torch.tensor([ids])).logits[0, -1]
        total += float(logits[token] - torch.logsumexp(logits, 0))
        ids = [*ids, token]
    return total


@torch.no_grad()
def test_the_loss_is_that_of_dpo(loaded):
    """TRL's: −logsigmoid(beta · ((chosen − ref chosen) − (rejected − ref rejected)))."""
    model, tokenizer = loaded
    reference = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    options = PreferenceOptions(beta=0.3, batch_size=2)
    source = PairSource(ROWS, tokenizer, options)
    source.measure_reference(reference)
    found = source.compare(model).losses
    for row, loss in zip(ROWS, found, strict=True):
        chosen, rejected = (
            by_hand(model, tokenizer, row["prompt"], row[side])
            - by_hand(reference, tokenizer, row["prompt"], row[side])
            for side in ("chosen", "rejected")
        )
        expected = -math.log(1 / (1 + math.exp(-0.3 * (chosen - rejected))))
        assert float(loss) == pytest.approx(expected, rel=1e-10)
        assert abs(expected - math.log(2)) > 1e-3
    for parameter in model.parameters():
        parameter.div_(1.1)


def test_every_loss_is_log_2_before_training(loaded):
    model, tokenizer = loaded
    source = PairSource(ROWS, tokenizer, PreferenceOptions(beta=5.0, batch_size=2))
    source.measure_reference(model)
    # Other batches, so other padding, than those of the reference.
    for number in range(3):
        shares = source.loss(model, number).closure()
        torch.testing.assert_close(
            shares.detach(), torch.full((2,), math.log(2) / 2, dtype=torch.float64)
        )
    figures = source.compare(model).figures()
    assert figures["preference_margin"] == pytest.approx(0, abs=1e-9)
    now = source.reference
    assert figures["preference_ranked_right"] == float((now[:, 0] > now[:, 1]).double().mean())


def test_figures_of_a_known_comparison():
    now = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]]).double()
    reference = torch.tensor([[-2.0, -2.0], [-3.0, -4.0]]).double()
    figures = Compared(now, reference, 0.5).figures()
    assert figures == {
        "preference_loss": pytest.approx(
            (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(1.5))) / 2
        ),
        "preference_margin": -1.0,
        "preference_margin_above_0": 0.5,
        "preference_ranked_right": 0.5,
    }


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_all_layouts_of_trl_give_the_same_pair():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    text = {"prompt": "Is it 3? A:", "chosen": " yes, good", "rejected": " yes, bad"}
    whole = {side: text["prompt"] + text[side] for side in ("chosen", "rejected")}
    assert written(read_pairs(table(text), tokenizer)[0]) == [
        "Is it 3? A:[ yes, good]",
        "Is it 3? A:[ yes, bad]",
    ]
    # What both answers begin with belongs to the prompt, up to whole words.
    assert written(read_pairs(table(whole), tokenizer)[0]) == [
        "Is it 3? A: yes,[ good]",
        "Is it 3? A: yes,[ bad]",
    ]
    before = [user("a"), assistant("b"), user("c")]
    explicit = {"prompt": before, "chosen": [assistant("d")], "rejected": [assistant("e")]}
    implicit = {side: before + explicit[side] for side in ("chosen", "rejected")}
    named = implicit | {"prompt": "c"}  # ultrafeedback's: also the question as a text
    expected = "<|user|>a<eos><|assistant|>b<eos><|user|>c<eos><|assistant|>[{}<eos>]"
    for row in (explicit, implicit, named):
        pair = read_pairs(table(row), tokenizer)[0]
        assert written(pair) == [expected.format("d"), expected.format("e")]


def test_pairs_that_tell_nothing_are_left_out_and_counted(loaded):
    _, tokenizer = loaded
    same = {"prompt": "It was", "chosen": " good", "rejected": " good"}
    long = {"prompt": "It was", "chosen": " good", "rejected": " bad" * 40}
    encoder = Encoder(tokenizer, max_length=16)
    found, (note,) = encode_pairs(encoder, read_pairs(table(same, ROWS[0], long), tokenizer))
    assert len(found) == 1
    assert note.startswith("preference pairs left out: 2. The first: row 1: its two answers are")
    with pytest.raises(UserError, match="none of the 1 preference pairs can be used: row 1"):
        PairSource([same], tokenizer)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no preference pairs"),
        ([{"prompt": "a", "chosen": "b"}], "no column 'rejected'.*preference.rejected"),
        ([ROWS[0], {**ROWS[0], "rejected": " "}], "row 2: 'rejected' is empty"),
        ([{**ROWS[0], "rejected": 3}], "row 1: 'rejected' is 3, not a text"),
        ([{"chosen": "a b", "rejected": "c d"}], "begin differently"),
        ([{**ROWS[0], "chosen": [assistant("a")]}], "row 1: 'rejected' must be a list"),
        ([{**ROWS[0], "chosen": [assistant("a")], "rejected": [assistant("b")]}], "'prompt' must"),
        ([{**ROWS[0], "chosen": [user("a")], "rejected": [user("b")]}], "must be the assistant's"),
    ],
)
def test_bad_rows_are_one_error(rows, words):
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.pad_token = CHAT_TEMPLATE, tokenizer.eos_token
    with pytest.raises(UserError, match=words):
        PairSource(rows, tokenizer)


@torch.no_grad()
def test_the_likelihood_of_an_encoder_decoder_is_that_of_its_labels(encoder_decoder_folder):
    """Minus transformers' loss, times the number of labels."""
    model, tokenizer = load_model(encoder_decoder_folder, head="seq2seq")
    found = PairSource(ROWS, tokenizer, head="seq2seq").compare(model.eval()).now
    for row, sums in zip(ROWS, found, strict=True):
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        for side, value in zip(("chosen", "rejected"), sums, strict=True):
            labels = torch.tensor([tokenizer(text_target=row[side])["input_ids"]])
            loss = model(input_ids=ids, labels=labels).loss
            assert float(value) == pytest.approx(-float(loss) * labels.numel(), rel=1e-5)
