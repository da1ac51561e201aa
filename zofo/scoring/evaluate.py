"""Scores on held-out rows, with 95% confidence intervals.

The prediction is the candidate with the highest mean log-likelihood. Accuracy has Wilson's
interval, and AUC (two classes) DeLong's. A prior for one label word can hold accuracy at chance,
but it leaves AUC unchanged. The majority rate is given for comparison. Generated answers are scored
by exact match, and by F1 with a percentile bootstrap over rows.

References:
    DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988.
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from zofo.scoring.generate import Writer
from zofo.tasks.encode import Collator, Encoded
from zofo.tasks.losses import candidate_scores, token_scores
from zofo.tasks.spec import Kind

_CONFIDENCE: Final = 0.95
_NUM_RESAMPLES: Final = 2000
"""Bootstrap resamples; its bounds then vary with the seed by about 2% of the interval."""


@dataclass(frozen=True)
class Metrics:
    """Scores; None if a quantity does not apply to the task.

    Attributes:
        num_rows: rows measured.
        loss: mean negative log-likelihood: of the right candidate among the candidates
            (classification, choice), or a target token (completion, generation), in nats.
        accuracy, accuracy_low, accuracy_high: share of right predictions and its 95% interval. For
            completions: share of target tokens with the highest probability, without an interval.
        f1, f1_low, f1_high: mean F1 of generated answers and its 95% interval (generation).
        exact_match, exact_match_low, exact_match_high: share of generated answers that equal a gold
            answer, and its 95% interval (generation).
        majority: share of the commonest class, which is the accuracy of always guessing it.
        auc, auc_low, auc_high: area under the ROC curve and its 95% interval (two classes).
        perplexity: exp of the loss of completions.
    """

    num_rows: int
    loss: float
    accuracy: float
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    majority: float | None = None
    auc: float | None = None
    auc_low: float | None = None
    auc_high: float | None = None
    perplexity: float | None = None
    f1: float | None = None
    f1_low: float | None = None
    f1_high: float | None = None
    exact_match: float | None = None
    exact_match_low: float | None = None
    exact_match_high: float | None = None

    def as_dict(self) -> dict[str, float]:
        """The scores that apply to the task."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@torch.no_grad()
def predict_scores(
    model: nn.Module,
    rows: Sequence[Encoded],
    collator: Collator,
    *,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Scores of every row's candidates: float64 arrays [candidates], in the rows' order.

    The model runs in evaluation mode. Rows of similar length share a batch.
    """
    scores: list[np.ndarray | None] = [None] * len(rows)
    for indices, batch in _batches(model, rows, collator, batch_size, progress):
        for i, values in zip(indices, candidate_scores(model, batch).double().cpu(), strict=True):
            # Rows may differ in their number of candidates; −inf pads the shorter ones.
            num = len(rows[i].targets) or len(values)
            scores[i] = values[:num].numpy()
    return [values for values in scores if values is not None]


def evaluate(
    model: nn.Module,
    rows: Sequence[Encoded],
    collator: Collator,
    *,
    kind: Kind = "classification",
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
    writer: Writer | None = None,
) -> Metrics:
    """Measure a model on rows; the result does not depend on the batch size.

    Args:
        model: the model, on its device.
        rows: encoded examples, at least one.
        collator: pads rows into batches.
        kind: kind of the task.
        batch_size: rows per forward pass.
        progress: called with the number of rows just done.
        writer: generates the answers if kind is "generation".
    """
    if kind == "generation":
        if writer is None:
            raise ValueError("kind is 'generation', which needs a writer")
        learnt = _evaluate_completions(model, rows, collator, batch_size, None)
        prompts = [row.prompt for row in rows]
        written = writer(model, prompts, batch_size=batch_size, progress=progress)
        return _with_answers(learnt, rows, written.texts)
    if kind == "completion":
        return _evaluate_completions(model, rows, collator, batch_size, progress)
    scores = predict_scores(model, rows, collator, batch_size=batch_size, progress=progress)
    return classification_metrics(
        scores, [row.gold for row in rows], has_classes=kind == "classification"
    )


def classification_metrics(
    scores: Sequence[np.ndarray], gold: Sequence[int], *, has_classes: bool = True
) -> Metrics:
    """Metrics from candidates' scores.

    Args:
        scores: one array [candidates] per row.
        gold: index of the right candidate of each row.
        has_classes: all rows have the same classes; without them there is neither AUC nor majority.
    """
    right = sum(int(np.argmax(s)) == g for s, g in zip(scores, gold, strict=True))
    losses = [float(np.logaddexp.reduce(s) - s[g]) for s, g in zip(scores, gold, strict=True)]
    low, high = wilson_interval(right, len(gold))
    auc: tuple[float | None, float | None, float | None] = (None, None, None)
    if has_classes and all(len(s) == 2 for s in scores) and len(set(gold)) == 2:
        auc = auc_interval([float(s[1] - s[0]) for s in scores], gold)
    return Metrics(
        num_rows=len(gold),
        loss=math.fsum(losses) / len(losses),
        accuracy=right / len(gold),
        accuracy_low=low,
        accuracy_high=high,
        majority=float(max(np.bincount(gold))) / len(gold) if has_classes else None,
        auc=auc[0],
        auc_low=auc[1],
        auc_high=auc[2],
    )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(_CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def auc_interval(scores: Sequence[float], labels: Sequence[int]) -> tuple[float, float, float]:
    """Area under the ROC curve with DeLong's 95% interval, cut to [0, 1].

    Args:
        scores: higher means class 1.
        labels: 0 or 1, both present.
    """
    from scipy.stats import norm, rankdata

    values, positive = np.asarray(scores), np.asarray(labels) == 1
    ahead, behind = values[positive], values[~positive]
    ranks = rankdata(np.concatenate([ahead, behind]))
    # Placements: the share of the other class that each score beats, ties counting half.
    above = (ranks[: len(ahead)] - rankdata(ahead)) / len(behind)
    below = 1 - (ranks[len(ahead) :] - rankdata(behind)) / len(ahead)
    auc = float(above.mean())

    def variance(placements: np.ndarray) -> float:
        # A single row gives no estimate; 0.25 is the largest variance of a value in [0, 1].
        return float(placements.var(ddof=1)) / len(placements) if len(placements) > 1 else 0.25

    half = float(norm.ppf(0.5 + _CONFIDENCE / 2)) * math.sqrt(variance(above) + variance(below))
    return auc, max(0.0, auc - half), min(1.0, auc + half)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% percentile bootstrap interval of a mean; the resamples have a fixed seed."""
    sample = np.asarray(values, dtype=np.float64)
    generator = np.random.Generator(np.random.Philox(0))
    means = [
        generator.choice(sample, len(sample), replace=True).mean() for _ in range(_NUM_RESAMPLES)
    ]
    low, high = np.quantile(means, [0.5 - _CONFIDENCE / 2, 0.5 + _CONFIDENCE / 2])
    return float(low), float(high)


def _with_answers(learnt: Metrics, rows: Sequence[Encoded], texts: Sequence[str]) -> Metrics:
    answers = [row.answers for row in rows]
    pairs = [(a, text) for a, text in zip(answers, texts, strict=True) if a is not None]
    shares = [a.f1(text) for a, text in pairs]
    right = sum(int(a.exact_match(text)) for a, text in pairs)
    f1_low, f1_high = bootstrap_interval(shares)
    low, high = wilson_interval(right, len(pairs))
    return replace(
        learnt,
        f1=math.fsum(shares) / len(shares),
        f1_low=f1_low,
        f1_high=f1_high,
        exact_match=right / len(pairs),
        exact_match_low=low,
        exact_match_high=high,
    )


@torch.no_grad()
def _evaluate_completions(
    model: nn.Module,
    rows: Sequence[Encoded],
    collator: Collator,
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> Metrics:
    """Mean loss per token, and the share of tokens that are the model's first choice."""
    losses, right, num_tokens = [], 0, 0
    for _, batch in _batches(model, rows, collator, batch_size, progress):
        tokens = token_scores(model, batch, with_first_choice=True)
        losses.append(-float(tokens.log_likelihood.double().sum()))
        assert tokens.is_first_choice is not None
        right += int(tokens.is_first_choice.sum())
        num_tokens += len(tokens.log_likelihood)
    loss = math.fsum(losses) / num_tokens
    return Metrics(
        num_rows=len(rows),
        loss=loss,
        accuracy=right / num_tokens,
        perplexity=math.exp(min(loss, 700.0)),  # exp of more than about 709 overflows
    )


def _batches(
    model: nn.Module,
    rows: Sequence[Encoded],
    collator: Collator,
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> Any:
    """(indices, batch), longest rows first, so that a lack of memory is noticed at once."""
    order = sorted(range(len(rows)), key=lambda i: -rows[i].length)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = collator([rows[i] for i in indices])
            yield indices, {key: value.to(device) for key, value in batch.items()}
            if progress is not None:
                progress(len(indices))
    finally:
        model.train(was_training)
