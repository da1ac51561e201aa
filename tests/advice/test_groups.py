"""Tests of learning rates by group.

They check how weights are grouped, what the patterns match, and when a split is made.
"""

import fnmatch

import numpy as np
import pytest

from tests.advice.test_rates import measured
from tests.support.models import ARCHITECTURES, build
from zofo.advice.groups import groups_of, kind_of, pattern_of, patterns_of, split_rates
from zofo.advice.moments import moments
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import param_groups


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("model.layers.3.mlp.up_proj.weight", "mlp"),
        ("model.layers.3.input_layernorm.weight", "norm"),
        ("transformer.h.0.ln_1.bias", "norm"),
        ("bert.encoder.layer.0.attention.self.query.weight", "attention"),
        ("bert.encoder.layer.0.output.dense.weight", "mlp"),
        ("classifier.weight", "head"),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "mlp"),
        ("something.else", "other"),
    ],
)
def test_kinds_of_weights(name, kind):
    assert kind_of(name) == kind


def test_numbers_of_layers_become_stars():
    assert pattern_of("model.layers.12.mlp.up_proj.weight") == "model.layers.*.mlp.up_proj.weight"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_patterns_give_every_weight_its_groups_rate(architecture):
    model = build(architecture)
    names = list(split_parameters(model).base)
    groups = groups_of(names)
    assert sorted(n for found in groups.values() for n in found) == sorted(names)
    assert len(groups) >= 3
    patterns = patterns_of(groups)
    for group, members in groups.items():
        for name in members:
            first = next(p for p in patterns if fnmatch.fnmatchcase(name, p))
            assert patterns[first] == group
    # Used as `base_lr`, the patterns cover every weight.
    made = param_groups(model, "hybrid", base_lr=dict.fromkeys(patterns, 1e-5))
    assert sum(len(g["names"]) for g in made if g["block"] == "base") == len(names)


def parts(curvatures, gradients, *, num, seed=0):
    return {
        name: moments(
            measured(np.full(30, c), np.full(30, g), 0.01, num=num, seed=seed + i), seed=i
        )
        for i, (name, c, g) in enumerate(zip("ab", curvatures, gradients, strict=True))
    }


GROUPS = {"a": ["a.0.weight", "a.1.weight"], "b": ["b.0.weight"]}


def test_groups_with_other_curvature_get_other_rates():
    found = split_rates(parts((1.0, 100.0), (1.0, 1.0), num=40), GROUPS, batch_rows=8, rate=1e-3)
    assert set(found.rates) == {"a.*.weight", "b.*.weight"}
    assert found.rates["a.*.weight"] > 10 * found.rates["b.*.weight"]
    # Two groups with equal gradients and τ in the ratio 1 : 100 gain Σ (G²/τ) / ((Σ G)² / Σ τ).
    assert found.gain == pytest.approx((1 + 0.01) * 101 / 4, rel=0.5)
    best = {name: i.value for name, i in found.groups.items()}
    assert best["a"] / best["b"] == pytest.approx(100, rel=0.6)


def test_equal_groups_keep_one_rate():
    """At most one draw in sixty splits two equal groups, although each has only four directions."""
    found = [
        split_rates(
            parts((10.0, 10.0), (1.0, 1.0), num=4, seed=10 * seed),
            GROUPS,
            batch_rows=8,
            rate=1e-3,
        )
        for seed in range(60)
    ]
    assert sum(bool(split.rates) for split in found) <= 1
    assert any("overlap" in split.reason for split in found)


@pytest.mark.parametrize(("signal", "noise"), [(1.0, 0.3), (1.0, 1.0), (0.1, 1.0)])
def test_six_equal_groups_keep_one_rate_however_noisy_their_rows(signal, noise):
    """Noisy rows rarely cause a false split.

    The estimator subtracts the rows' noise from a mean square that is itself uncertain.
    """
    groups = {name: [f"{name}.0.weight"] for name in "abcdef"}
    num_false = 0
    for seed in range(60):
        found = {
            name: moments(
                measured(
                    np.full(30, 1.0),
                    np.full(30, np.sqrt(signal / 30)),
                    8 * noise,
                    num=4,
                    seed=1000 * seed + i,
                ),
                seed=i,
            )
            for i, name in enumerate(groups)
        }
        num_false += bool(split_rates(found, groups, batch_rows=8, rate=1e-3).rates)
    assert num_false <= 2


@pytest.mark.parametrize("num_directions", [1, 8])
def test_a_groups_bend_is_that_of_its_share_of_the_scalar(num_directions):
    """A group's curvature term counts only its own share of the scalar.

    The reference is a Monte Carlo estimate over equal groups whose curvature lies along their
    gradients only.
    """
    num_groups, d, curvature = 5, 4, 3.0
    generator = np.random.default_rng(0)
    v = generator.normal(size=(100_000, num_directions, num_groups, d))
    scalars = v[:, :, :, 0].sum(axis=2)
    step = (scalars[:, :, None, None] * v).mean(axis=1)
    bent = (curvature * step[:, 0, 0] ** 2).mean() / num_groups
    eigenvalues, gradient = np.array([curvature, 0, 0, 0]), np.array([1.0, 0, 0, 0])
    names = [f"g{i}" for i in range(num_groups)]
    found = split_rates(
        dict.fromkeys(names, moments(measured(eigenvalues, gradient, 1e-9, num=20_000, seed=1))),
        {n: [f"{n}.weight"] for n in names},
        batch_rows=8,
        rate=1e-3,
        num_directions=num_directions,
    )
    # The best rate of a group is η_g = G_g / (E s² τ_g), and each of the equal groups has its share
    # of G.
    assert 1 / (num_groups * found.groups["g0"].value) == pytest.approx(bent, rel=0.1)


def test_a_split_bends_the_loss_as_the_one_rate_does():
    measured_parts = parts((1.0, 100.0), (1.0, 1.0), num=40)
    found = split_rates(measured_parts, GROUPS, batch_rows=8, rate=1e-3)
    traces = {name: part.trace for name, part in measured_parts.items()}
    bent = sum(found.rates[f"{g}.*.weight"] ** 2 * traces[g] for g in "ab")
    assert bent == pytest.approx(1e-6 * sum(traces.values()), rel=0.3)
