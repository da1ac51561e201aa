import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zofo.models.loading import load_model
from zofo.scoring.evaluate import (
    auc_interval,
    bootstrap_interval,
    classification_metrics,
    evaluate,
    predict_scores,
    wilson_interval,
)
from zofo.scoring.generate import Writer
from zofo.tasks.answers import Answers, squad_words
from zofo.tasks.encode import Collator, Encoder
from zofo.tasks.spec import Completion, Example


def test_wilson_known_answer():
    # Wilson's formula for 8 of 10 with z = 1.959964, computed by hand.
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.490162, abs=1e-5)
    assert high == pytest.approx(0.943318, abs=1e-5)


@given(
    st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=4, max_size=40).filter(
        lambda pairs: len({label for _, label in pairs}) == 2
    )
)
def test_auc_is_the_share_of_pairs_in_order(pairs):
    ahead = [score for score, label in pairs if label]
    behind = [score for score, label in pairs if not label]
    share = np.mean([(a > b) + 0.5 * (a == b) for a in ahead for b in behind])
    auc, low, high = auc_interval([s for s, _ in pairs], [int(label) for _, label in pairs])
    assert auc == pytest.approx(share)
    assert 0 <= low <= auc + 1e-12
    assert auc - 1e-12 <= high <= 1


def test_the_auc_interval_covers_as_it_says():
    generator = np.random.default_rng(0)
    truth = 0.7602499389065233  # This is P(N(1,1) > N(0,1)) = Phi(1/sqrt 2).
    covered = 0
    for _ in range(400):
        labels = np.repeat([0, 1], 60)
        _, low, high = auc_interval(generator.normal(labels), labels)
        covered += low <= truth <= high
    # The bounds are three standard deviations, 0.033, from 95% of 400 trials.
    assert 0.917 <= covered / 400 <= 0.983


def test_metrics_known_answer():
    scores = [np.log([0.9, 0.1]), np.log([0.6, 0.4]), np.log([0.3, 0.7]), np.log([0.8, 0.2])]
    metrics = classification_metrics(scores, [0, 1, 1, 0])
    assert metrics.accuracy == 0.75
    assert metrics.auc == 1.0
    assert metrics.majority == 0.5
    assert metrics.loss == pytest.approx(-np.mean(np.log([0.9, 0.4, 0.7, 0.8])))


def test_a_label_prior_moves_accuracy_and_not_auc():
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 100)
    fair = generator.normal(labels * 2 - 1, 0.8)
    biased = [np.array([0.0, s + 5]) for s in fair]
    metrics = classification_metrics(biased, labels.tolist())
    assert metrics.accuracy == pytest.approx(0.5, abs=0.01)
    assert metrics.auc > 0.9


def test_choices_have_no_auc():
    metrics = classification_metrics([np.array([0.0, 1.0])] * 4, [0, 1, 1, 0], has_classes=False)
    assert metrics.auc is None
    assert metrics.majority is None


@pytest.fixture(scope="module")
def scored(decoder_folder):
    model, tokenizer = load_model(decoder_folder)
    words = ["film", "warm", "dull", "story", "mess", "way"]
    examples = [
        Example(" ".join(words[: 1 + i % 6]), (" great", " terrible bad"), i % 2, str(i), i)
        for i in range(13)
    ]
    encoder = Encoder(tokenizer)
    return model, [encoder(e) for e in examples], Collator(tokenizer.pad_token_id)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_batch_size_changes_nothing(scored, batch_size):
    model, rows, collator = scored
    reference = evaluate(model, rows, collator, batch_size=5).as_dict()
    found = evaluate(model, rows, collator, batch_size=batch_size).as_dict()
    assert found.keys() == reference.keys()
    for key, value in reference.items():
        assert found[key] == pytest.approx(value, abs=1e-6)


def test_scores_keep_the_rows_order(scored):
    model, rows, collator = scored
    forth = predict_scores(model, rows, collator, batch_size=4)
    back = predict_scores(model, rows[::-1], collator, batch_size=4)[::-1]
    for a, b in zip(forth, back, strict=True):
        assert np.allclose(a, b, atol=1e-6)


def test_evaluation_leaves_mode_and_generators_alone(scored):
    model, rows, collator = scored
    model.train()
    state = torch.get_rng_state()
    done = []
    evaluate(model, rows, collator, batch_size=4, progress=done.append)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(done) == len(rows)
    model.eval()


def test_completions_count_tokens(decoder_folder):
    model, tokenizer = load_model(decoder_folder)
    encoder = Encoder(tokenizer)
    rows = [
        encoder(Completion((("the", False), (text, True)), "", 1))
        for text in (" film", " film is a warm story", " mess")
    ]
    metrics = evaluate(model, rows, Collator(tokenizer.pad_token_id), kind="completion")
    # The predictions of an untrained model are nearly uniform over its vocabulary.
    assert metrics.perplexity == pytest.approx(len(tokenizer), rel=0.3)
    assert metrics.loss == pytest.approx(np.log(metrics.perplexity))
    assert 0 <= metrics.accuracy <= 1
    assert metrics.auc is None


def test_bootstrap_interval():
    # The reference is the normal interval of a share of 1000 rows, 0.3 ± 1.96 · sqrt(0.3 · 0.7 /
    # 1000).
    low, high = bootstrap_interval([1.0] * 300 + [0.0] * 700)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - half, abs=0.004)
    assert high == pytest.approx(0.3 + half, abs=0.004)
    assert bootstrap_interval([0.25] * 5) == (0.25, 0.25)
    assert bootstrap_interval([0.0, 0.5, 1.0]) == bootstrap_interval([0.0, 0.5, 1.0])


def test_written_answers_are_scored(decoder_folder):
    model, tokenizer = load_model(decoder_folder)
    prompts = [tokenizer(text)["input_ids"] for text in ("the film", "a dull mess", "great")]
    texts = Writer(tokenizer, 3, one_line=True)(model, prompts).texts
    assert any(squad_words(text) for text in texts)
    right = [f"The {texts[0]}!", f"{texts[1]} Rome", "Rome"]
    rows = [
        Encoder(tokenizer, max_new_tokens=3)(
            Completion(
                ((tokenizer.decode(p), False), (" x", True)), "", 1, answers=Answers(((gold,),))
            )
        )
        for p, gold in zip(prompts, right, strict=True)
    ]
    done = []
    metrics = evaluate(
        model,
        rows,
        Collator(tokenizer.pad_token_id),
        kind="generation",
        progress=done.append,
        writer=Writer(tokenizer, 3, one_line=True),
    )
    assert sum(done) == 3
    num_words = len(squad_words(texts[1]))
    partly = 2 * num_words / (2 * num_words + 1)
    assert metrics.f1 == pytest.approx((1 + partly + 0) / 3)
    assert metrics.exact_match == pytest.approx(1 / 3)
    assert metrics.f1_low <= metrics.f1 <= metrics.f1_high
    assert metrics.exact_match_low < 1 / 3 < metrics.exact_match_high
    assert metrics.perplexity == pytest.approx(np.exp(metrics.loss))
