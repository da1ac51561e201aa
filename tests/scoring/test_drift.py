"""The drift is the KL divergence of the next-token distributions from those at the beginning."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from zofo.scoring.drift import Drift


class Coin(nn.Module):
    """Says heads with one probability after every token."""

    def __init__(self, p):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([p, 1 - p]).log(), requires_grad=False)
        self.num_virtual = 2

    def forward(self, input_ids):
        rows = torch.zeros(1, self.num_virtual, 2), self.logits.expand(*input_ids.shape, 2)
        return SimpleNamespace(logits=torch.cat(rows, 1))


def tokens(text):
    return {"input_ids": [0] * len(text)}


def test_the_drift_of_a_coin_is_that_of_the_formula():
    model = Coin(0.25).train()
    drift = Drift(model, tokens, ["one", "", "three"])
    assert drift.measure(model) == 0
    with torch.no_grad():
        model.logits.copy_(torch.tensor([0.5, 0.5]).log())
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert drift.measure(model) == pytest.approx(expected, rel=1e-5)
    assert model.training
