"""How far a language model has drifted: the KL divergence from its beginning on fixed texts.

    drift = mean over the tokens of KL(p_before ‖ p_now), in nats

p is the distribution of the next token. The texts are general, because a reward can cost abilities
that the prompts of the run do not need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

TEXTS: Final = (
    "The capital of France is Paris, a city of about two million people on the Seine.",
    "She closed the door, put the keys on the table and asked her brother what had happened.",
    "To add two fractions, first write both of them with the same denominator.",
    "def mean(values):\n    return sum(values) / len(values)\n",
)
"""Fixed texts, so few that the distributions of all their tokens stay in memory."""


class Drift:
    """Measures the drift from the model as it is now.

    Args:
        model: a decoder, perhaps with an adapter.
        tokenizer: its tokenizer.
        texts: what its distributions are compared on; at least one must have a token.
    """

    def __init__(self, model: Any, tokenizer: Any, texts: Sequence[str] = TEXTS) -> None:
        rows = (tokenizer(text)["input_ids"] for text in texts)
        self._ids = [torch.tensor([row]) for row in rows if row]
        self._before = [self._log_probs(model, ids) for ids in self._ids]

    def measure(self, model: Any) -> float:
        """The drift of the model, without a change of its mode, in nats per token."""
        total = 0.0
        for ids, before in zip(self._ids, self._before, strict=True):
            now = self._log_probs(model, ids)
            total += float((before.exp() * (before - now)).sum())
        return total / sum(len(before) for before in self._before)

    @staticmethod
    @torch.no_grad()
    def _log_probs(model: Any, ids: Tensor) -> Tensor:
        """Log-probabilities of the next token after each token: float32 [tokens, vocabulary]."""
        was_training = model.training
        model.eval()
        try:
            logits = model(input_ids=ids.to(next(model.parameters()).device)).logits
        finally:
            model.train(was_training)
        # Virtual tokens of a prompt come first. MPS has no float64.
        return logits[0, -ids.shape[1] :].cpu().double().log_softmax(-1).float()
