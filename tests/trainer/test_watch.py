import math

import pytest
import torch

from zofo.noise.combine import combine
from zofo.trainer.watch import Watch


def watch(dtype=torch.float32, eps=1e-3):
    return Watch(loss_dtype=dtype, weight_dtype=dtype, weight_scale=0.02, eps=eps)


def observe(watcher, steps, loss=lambda t: 1.0, s=10.0, lr=1e-5):
    return [text for t in range(steps) for text in watcher.observe(loss(t), (s,), lr)]


def test_a_healthy_run_is_not_warned_of():
    assert observe(watch(), 200, loss=lambda t: 2.0 * 0.99**t + 0.1 * (t % 3)) == []


def test_signal_to_rounding_known_answer():
    # |s| eps = 1e-2 is compared with a rounding error of 2^-24 · 0.5.
    found = watch().signal_to_rounding(0.5, (10.0,))
    assert found == pytest.approx(1e-2 / (2.0**-24 * 0.5))


@pytest.mark.parametrize(("eps", "warned"), [(1e-8, True), (1e-3, False)])
def test_differences_that_drown_in_rounding(eps, warned):
    found = observe(watch(eps=eps), 60)
    assert len(found) == warned  # The watch warns once per run.
    assert all("raise eps" in text for text in found)


def test_rounding_noise_really_sets_in_where_the_ratio_says():
    """The ratio predicts where rounding dominates.

    At a ratio of 1 the float32 difference is mostly noise. At 1000 it is exact to a percent.
    """
    torch.manual_seed(0)
    w = torch.randn(10_000, dtype=torch.float64)
    v = torch.randint(0, 2, (10_000,)).double() * 2 - 1
    exact = float(w @ v)

    def loss(at):
        return (at.float() ** 2).sum() / 2

    errors = {}
    for eps in (1e-3, 1e-7):
        difference = float((loss(w + eps * v) - loss(w)).double()) / eps
        ratio = watch(eps=eps).signal_to_rounding(float(loss(w)), (exact,))
        errors[ratio] = abs(difference - exact - eps * len(w) / 2) / abs(exact)
    assert min(errors) < 10 < max(errors)
    assert errors[min(errors)] > 0.1 > errors[max(errors)]


@pytest.mark.parametrize(("lr", "warned"), [(1e-13, True), (1e-5, False)])
def test_a_16_bit_base_that_stands_still(lr, warned):
    found = observe(watch(torch.bfloat16, eps=1.0), 60, lr=lr)
    assert len(found) == warned
    assert all("stands still" in text for text in found)
    assert observe(watch(torch.float32), 60, lr=lr) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_is_said_to_stand_still_where_rounding_loses_every_update(dtype):
    weight = torch.full((1_000_000,), 0.75, dtype=dtype)
    lost, kept = torch.finfo(torch.float32).eps / 4, torch.finfo(torch.float32).eps
    for update, is_lost in ((lost, True), (kept, False)):
        out = combine(
            weight,
            (update * 0.75,),
            out=torch.empty_like(weight),
            seed=1,
            step=0,
            tensor=0,
            rounding="stochastic",
        )
        moved = int((out != weight).sum())
        assert (moved == 0) == is_lost
        watcher = Watch(loss_dtype=dtype, weight_dtype=dtype, weight_scale=0.75, eps=1.0)
        found = observe(watcher, 60, s=1.0, lr=update * 0.75)
        assert any("stands still" in text for text in found) == is_lost


def test_a_loss_that_diverges():
    found = observe(watch(), 200, loss=lambda t: 1.0 if t < 60 else 1.1 ** (t - 60), s=1e6)
    assert len(found) == 1
    assert "diverges" in found[0]
    assert math.isfinite(float(found[0].split("diverges: ")[1].split(" ")[0]))


def test_a_score_that_mostly_does_not_notice_the_perturbation():
    watcher = watch()
    watcher.has_own_loss = True
    found = [t for i in range(60) for t in watcher.observe(1.0, (0.0, 5.0 * (i % 3 == 0)), 1e-5)]
    assert len(found) == 1  # The watch warns once per run.
    assert "exactly 0" in found[0]
    assert "raise eps, the batch size or num_directions" in found[0]
    # With this eps the difference of the usual loss would be mostly rounding.
    healthy = watch(eps=1e-9)
    healthy.has_own_loss = True
    assert observe(healthy, 60) == []
