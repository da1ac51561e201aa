import pytest
import torch

from tests.support.hub_folders import make_tokenizer
from tests.support.models import build
from zofo.errors import UserError
from zofo.models.adapters import create_adapter
from zofo.models.loading import load_model
from zofo.tasks.encode import Collator, Encoder
from zofo.tasks.losses import candidate_scores, objective_loss, token_scores
from zofo.tasks.spec import Completion, Example


def example(prompt, candidates, gold=0):
    return Example(prompt, tuple(candidates), gold, prompt, 1)


ONE_TOKEN = example("the film is It was", [" terrible", " great"], gold=1)
MANY_TOKENS = example("a dull story", [" that goes nowhere", " loses", " bad mess Label"], gold=2)


def score_by_hand(model, tokenizer, prompt, candidate):
    """Return the mean log-likelihood of the candidate's tokens, from all logits of one sequence."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + candidate)["input_ids"]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    virtual = logits.shape[1] - ids.shape[1]
    logs = logits[:, virtual:].float().log_softmax(-1)
    return torch.stack([logs[0, i - 1, ids[0, i]] for i in range(start, ids.shape[1])]).mean()


@pytest.mark.parametrize("adapter", [None, "lora", "prefix", "prompt"])
@torch.no_grad()
def test_scores_are_the_mean_log_likelihoods(decoder_folder, adapter):
    model, tokenizer = load_model(decoder_folder)
    if adapter is not None:
        model = create_adapter(model, adapter, tokenizer=tokenizer)
    model.eval()
    examples = [ONE_TOKEN, MANY_TOKENS]
    encoder = Encoder(tokenizer)
    batch = Collator(tokenizer.pad_token_id)([encoder(e) for e in examples])
    scores = candidate_scores(model, batch)
    assert scores.shape == (2, 3)
    for row, e in zip(scores, examples, strict=True):
        expected = [score_by_hand(model, tokenizer, e.prompt, c) for c in e.candidates]
        assert torch.allclose(row[: len(expected)], torch.stack(expected), atol=1e-5)
        assert (row[len(expected) :] == -torch.inf).all()


def test_one_token_candidates_share_one_sequence():
    encoded = Encoder(make_tokenizer())(example("It was", [" great", " bad"]))
    assert len(encoded.rows) == 1
    assert len(Encoder(make_tokenizer())(MANY_TOKENS).rows) == 3


@torch.no_grad()
def test_objectives_by_their_definition(decoder_folder):
    model, tokenizer = load_model(decoder_folder)
    encoder = Encoder(tokenizer)
    batch = Collator(tokenizer.pad_token_id)([encoder(ONE_TOKEN), encoder(MANY_TOKENS)])
    scores = candidate_scores(model, batch)
    right = torch.stack([scores[0, 1], scores[1, 2]])
    assert torch.allclose(objective_loss(model, batch, "gold"), -right.mean())
    expected = (torch.logsumexp(scores, 1) - right).mean()
    assert torch.allclose(objective_loss(model, batch, "candidates"), expected)


@torch.no_grad()
def test_the_loss_of_completions_is_transformers_own(decoder_folder):
    model, tokenizer = load_model(decoder_folder)
    row = Completion((("the film", False), (" is great", True)), "", 1)
    encoded = Encoder(tokenizer)(row)
    batch = Collator(tokenizer.pad_token_id)([encoded])
    prompt = tokenizer("the film")["input_ids"]
    whole = prompt + tokenizer(" is great")["input_ids"] + [tokenizer.eos_token_id]
    labels = torch.tensor([[-100] * len(prompt) + whole[len(prompt) :]])
    expected = model(input_ids=torch.tensor([whole]), labels=labels).loss
    assert torch.allclose(objective_loss(model, batch), expected, atol=1e-6)


@torch.no_grad()
def test_padding_changes_no_score(decoder_folder):
    model, tokenizer = load_model(decoder_folder)
    encoder, collator = Encoder(tokenizer), Collator(tokenizer.pad_token_id)
    long = example("a warm and clever story that never loses its way " * 2, [" great", " bad"])
    alone = candidate_scores(model, collator([encoder(ONE_TOKEN)]))[0]
    beside = candidate_scores(model, collator([encoder(ONE_TOKEN), encoder(long)]))[0]
    assert torch.allclose(alone, beside, atol=1e-6)


@torch.no_grad()
def test_architectures_without_logits_to_keep(monkeypatch):
    model = build("llama", "prompt").eval()
    batch = Collator(0)([Encoder(FakeTokenizer())(example("1 2 3", ["4", "5"]))])
    kept = token_scores(model, batch).log_likelihood
    monkeypatch.setattr("zofo.tasks.losses._keeps_logits", lambda model: False)
    assert torch.allclose(token_scores(model, batch).log_likelihood, kept, atol=1e-6)


class FakeTokenizer:
    """Makes every digit one token."""

    bos_token_id, eos_token_id = None, 0

    def __call__(self, text, **kwargs):
        return {"input_ids": [int(c) for c in text if c.isdigit()]}


def test_long_prompts_lose_their_beginning():
    encoded = Encoder(FakeTokenizer(), max_length=8)(example("1" * 20 + "23", ["45", "6"]))
    assert encoded.rows == ((1, 1, 1, 1, 1, 2, 3, 4), (1, 1, 1, 1, 1, 2, 3))
    assert [[token for _, _, token in c] for c in encoded.targets] == [[4, 5], [6]]


def test_an_empty_prompt_conditions_on_a_start_token():
    encoded = Encoder(FakeTokenizer())(example("", ["4", "5"]))
    assert encoded.rows == ((0,),)


def test_a_candidate_without_tokens_is_refused():
    with pytest.raises(UserError, match="adds no token"):
        Encoder(FakeTokenizer())(example("12", ["", "3"]))


def test_encoders_see_the_text_alone(encoder_folder):
    model, tokenizer = load_model(encoder_folder, head="classification", num_labels=2)
    row = Example("ignored", (" a", " b"), 1, "the film", 1)
    encoded = Encoder(tokenizer, head="classification")(row)
    assert list(encoded.rows[0]) == tokenizer("the film")["input_ids"]
    batch = Collator(tokenizer.pad_token_id)([encoded])
    model.eval()
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits.log_softmax(-1)
    assert torch.allclose(candidate_scores(model, batch), logits)
    assert torch.allclose(objective_loss(model, batch), -logits[0, 1])


def pair(text, second, row=1):
    return Example("ignored", (" a", " b"), 1, (text, second), row)


@torch.no_grad()
def test_encoders_see_pairs_as_two_sequences(encoder_folder):
    model, tokenizer = load_model(encoder_folder, head="classification", num_labels=2)
    model.eval()
    # The segments of an untrained model have no meaning until their embeddings differ.
    model.bert.embeddings.token_type_embeddings.weight[1] += 1
    encoder, collator = Encoder(tokenizer, head="classification"), Collator(tokenizer.pad_token_id)
    short, long = pair("the film", "a mess"), pair("a warm and clever story", "never loses")
    batch = collator([encoder(short), encoder(long)])
    scores = candidate_scores(model, batch)
    for found, row in zip(scores, (short, long), strict=True):
        inputs = tokenizer(*row.text, return_tensors="pt")
        assert set(inputs["token_type_ids"][0].tolist()) == {0, 1}
        assert torch.allclose(found, model(**inputs).logits.log_softmax(-1)[0], atol=1e-6)
    flat = {**batch, "token_type_ids": torch.zeros_like(batch["token_type_ids"])}
    assert not torch.allclose(candidate_scores(model, flat), scores, atol=1e-6)


def test_the_longer_text_of_a_pair_is_cut(encoder_folder):
    _, tokenizer = load_model(encoder_folder, head="classification", num_labels=2)
    row = pair("the film " * 40, "a mess")
    encoded = Encoder(tokenizer, head="classification", max_length=16)(row)
    assert len(encoded.rows[0]) == len(encoded.types) == 16
    second = [i for i, kind in zip(encoded.rows[0], encoded.types, strict=True) if kind == 1]
    assert tokenizer.decode(second) == "a mess"


BLANK = Example("the ", ("film", "capital of France"), 0, "", 1, ending=" is a warm story")


def ending_by_hand(model, tokenizer, example, candidate):
    """Return the mean log-likelihood of the ending alone, after the prompt and one candidate."""
    start = tokenizer(example.prompt + candidate)["input_ids"]
    whole = tokenizer(example.prompt + candidate + example.ending)["input_ids"]
    assert whole[: len(start)] == start
    logs = model(input_ids=torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return torch.stack([logs[i - 1, whole[i]] for i in range(len(start), len(whole))]).mean()


@pytest.mark.parametrize("adapter", [None, "prompt"])
@torch.no_grad()
def test_what_follows_a_blank_is_scored_after_each_candidate(decoder_folder, adapter):
    model, tokenizer = load_model(decoder_folder)
    expected = torch.stack([ending_by_hand(model, tokenizer, BLANK, c) for c in BLANK.candidates])
    encoder, collator = Encoder(tokenizer), Collator(tokenizer.pad_token_id)
    encoded = encoder(BLANK)
    scored = [[token for _, _, token in tokens] for tokens in encoded.targets]
    assert scored[0] == scored[1] == tokenizer(BLANK.ending)["input_ids"]
    if adapter is None:
        # The example shares its batch with an example of another shape.
        found = candidate_scores(model, collator([encoder(MANY_TOKENS), encoded]))[1, :2]
        assert torch.allclose(found, expected, atol=1e-6)
        loss = objective_loss(model, collator([encoded]), "candidates")
        assert torch.allclose(loss, -expected.log_softmax(-1)[0], atol=1e-6)
        return
    model = create_adapter(model, adapter, tokenizer=tokenizer).eval()
    rows = [torch.tensor([(*row, scored[0][-1])]) for row in encoded.rows]
    num, found = len(scored[0]), candidate_scores(model, collator([encoded]))[0]
    for ids, score in zip(rows, found, strict=True):
        logs = model(input_ids=ids).logits[0, -num - 1 : -1].float().log_softmax(-1)
        assert torch.allclose(logs.gather(1, ids[0, -num:, None]).mean(), score, atol=1e-5)


def test_endings_keep_what_is_scored_when_too_long():
    row = Example("1" * 20, ("23", "4"), 1, "", 1, ending="567")
    encoded = Encoder(FakeTokenizer(), max_length=8)(row)
    assert encoded.rows == ((1, 1, 1, 1, 2, 3, 5, 6), (1, 1, 1, 1, 1, 4, 5, 6))
    assert [[t for _, _, t in tokens] for tokens in encoded.targets] == [[5, 6, 7], [5, 6, 7]]
    assert [[p for _, p, _ in tokens] for tokens in encoded.targets] == [[5, 6, 7], [5, 6, 7]]


class PairingTokenizer(FakeTokenizer):
    """Makes 2 and 5 side by side one token, 25."""

    def __call__(self, text, **kwargs):
        ids = super().__call__(text)["input_ids"]
        whole = "".join(map(str, ids)).replace("25", "x")
        return {"input_ids": [25 if c == "x" else int(c) for c in whole]}


def test_only_tokens_that_follow_every_candidate_are_scored():
    row = Example("1", ("2", "3"), 0, "", 1, ending="56")
    encoded = Encoder(PairingTokenizer())(row)
    assert encoded.rows == ((1, 25), (1, 3, 5))
    assert [[t for _, _, t in tokens] for tokens in encoded.targets] == [[6], [6]]
    with pytest.raises(UserError, match="other tokens after each candidate"):
        Encoder(PairingTokenizer())(Example("1", ("2", "3"), 0, "", 1, ending="5"))
