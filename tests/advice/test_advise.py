"""Tests of the advisor on small problems.

The advisor leaves the model unchanged, repeats itself, and advises rates that do not diverge.
"""

import contextlib
import copy
import math

import pytest
import torch

from tests.support.models import assert_same_bits, batch_for, bits, build
from tests.support.problems import Logistic, Quadratic, batch_of, loss, train
from zofo.advice.advise import advise, most_forwards
from zofo.advice.present import as_json, lines_of
from zofo.advice.setting import Setting
from zofo.errors import UserError
from zofo.optim.generators import GeneratorState


def quadratic(seed=0, **more):
    return Quadratic([1.0] * 20 + [10.0] * 2, [1.0, 5.0, 20.0], seed=seed, **more)


def ask(model, **setting):
    return advise(model, loss, batch_of, model.num_rows, Setting(num_steps=60, **setting))


def test_the_model_is_left_bit_for_bit():
    model = build("llama", "lora", lora_dropout=0.1).eval()
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    generators = GeneratorState.capture()

    def rows_of(m, batch):
        logits = m(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="none"
        ).view(len(logits), -1)
        return losses.mean(), losses.mean(dim=1).detach()

    pool = batch_for("llama", rows=48)
    advice = advise(
        model,
        rows_of,
        lambda rows: {name: tensor[list(rows)] for name, tensor in pool.items()},
        48,
        Setting(num_steps=20, batch_size=4),
    )
    assert_same_bits(before, bits(model))
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert generators.is_current()
    assert advice.eps > 0
    assert advice.adapter_lr > 0


@pytest.mark.parametrize("fails_at", [1, 20, 45, 70, 100])
def test_an_interrupted_advice_leaves_the_model_bit_for_bit(fails_at):
    model, calls = quadratic(), []

    def failing(m, rows):
        calls.append(rows)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return loss(m, rows)

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        advise(model, failing, batch_of, model.num_rows, Setting(num_steps=60))
    assert_same_bits(before, model.state_dict())


def test_advice_is_a_function_of_the_seed():
    found = [ask(quadratic(), seed=seed) for seed in (0, 0, 1)]
    same, again, other = [(a.eps, a.base_lr, a.adapter_lr, a.cost) for a in found]
    assert same == again
    assert same != other
    torch.rand(3)
    assert as_json(found[0]) == as_json(ask(quadratic(), seed=0))


@pytest.mark.parametrize(
    ("method", "base", "adapter", "eps"),
    [
        ("hybrid", True, True, True),
        ("fo-peft", False, True, False),
        ("zo-peft", False, True, True),
    ],
)
def test_every_method_is_told_what_it_moves_by(method, base, adapter, eps):
    asked = {"base_lr": "auto" if base else None, "adapter_lr": "auto" if adapter else None}
    advice = ask(quadratic(), method=method, **asked)
    given = [value is not None for value in (advice.base_lr, advice.adapter_lr, advice.eps)]
    assert given == [base, adapter, eps]
    json = as_json(advice)
    wanted = [
        k for k, is_asked in (("eps", eps), ("base_lr", base), ("adapter_lr", adapter)) if is_asked
    ]
    assert list(json["advised"]) == wanted
    assert all(isinstance(line, str) for line in lines_of(advice))


@pytest.mark.parametrize("method", ["fo-ft", "zo-ft"])
def test_full_fine_tuning(method):
    model = Logistic().requires_grad_(True)
    advice = ask(model, method=method, adapter_lr=None, usual_rate=1e-2)
    assert advice.base_lr > 0
    assert (advice.eps is None) == (method == "fo-ft")


def test_what_is_given_stays_and_is_not_measured():
    advice = ask(quadratic(), base_lr=1e-3, adapter_lr="auto", eps=1e-4)
    assert (advice.base_lr, advice.eps) == (1e-3, 1e-4)
    assert advice.plateau is None
    assert advice.at_start is None
    only_base = ask(quadratic(), adapter_lr=0.01, eps=1e-4)
    assert only_base.adapter_lr == 0.01
    assert only_base.first is None
    assert only_base.at_later is not None


def test_measurements_are_those_of_the_quadratic():
    model = quadratic()
    x, curves = model.inner.x.detach(), model.curves[0]
    gradient = curves * (x - model.rows[0].mean(dim=0))
    # The standard error of the mean of six directions is √(2 ‖H‖_F² / 6) = 8.6 for tr H = 40, and
    # √(2/6) ‖∇f‖² for the squared gradient norm.
    found = [ask(quadratic(), seed=seed, adapter_lr=0.01).at_start for seed in range(16)]
    assert sum(m.trace for m in found) / 16 == pytest.approx(float(curves.sum()), rel=0.15)
    assert sum(m.signal for m in found) / 16 == pytest.approx(float(gradient @ gradient), rel=0.45)


def test_a_base_that_does_nothing_is_said_to_be_hopeless():
    model = Quadratic([1e-9] * 5, [1.0, 4.0])
    advice = ask(model)
    assert advice.is_hopeless
    assert "hopeless" in advice.remarks[0]
    assert "fo-peft costs a third less" in advice.remarks[0]
    assert "less than 0" not in advice.remarks[0]
    assert not ask(quadratic()).is_hopeless


def test_caps_are_shown_and_applied_when_asked():
    ignored, applied = ask(quadratic()), ask(quadratic(), caps="apply", target=0.1)
    assert set(ignored.caps) == {
        f"{b} {r}" for b in ("base", "adapter") for r in ("sqrt(Tn)", "sqrt(T)n")
    }
    assert applied.base_lr <= 1.01 * applied.caps["base sqrt(Tn)"].rate
    assert applied.base_lr < ignored.base_lr
    assert applied.base_lr == float(f"{applied.base_lr:.2g}")
    assert "base" in applied.capped
    assert not ignored.capped
    assert "cap" in " ".join(lines_of(ignored))
    # The expected progress is computed for the advised rate, which the cap lowered.
    assert 0 <= applied.progress.value < ignored.progress.value
    assert "the theorem's cap; without it" in " ".join(lines_of(applied))


def test_a_cap_that_cannot_be_computed_is_said():
    model = Quadratic([-1.0] * 12, [1.0, 5.0], start=0.1)
    advice = ask(model, caps="apply")
    assert "base" not in advice.capped
    assert "cannot be computed" in " ".join(lines_of(advice))


def test_the_cost_is_counted_and_a_small_part_of_a_grid():
    calls = []

    def counted(m, rows):
        calls.append(len(rows) / 8 * (2 if torch.is_grad_enabled() else 1))
        return loss(m, rows)

    model = quadratic()
    setting = Setting(num_steps=100)
    advice = advise(model, counted, batch_of, model.num_rows, setting)
    assert advice.cost == pytest.approx(math.fsum(calls))
    assert advice.cost < 0.1 * 16 * setting.forwards_of_run


@pytest.mark.parametrize("method", ["hybrid", "fo-peft", "zo-peft", "fo-ft", "zo-ft"])
@pytest.mark.parametrize(
    "given", [{}, {"eps": 1e-4}, {"adapter_lr": 1e-2}, {"base_lr": 1e-4, "accumulation": 2}]
)
@pytest.mark.parametrize(("batch_size", "num_steps"), [(4, 20), (8, 75)])
def test_what_it_may_cost_is_known_before(method, given, batch_size, num_steps):
    """`most_forwards` is an upper bound of the cost, and not a loose one.

    The cost is highest when every rate does harm, because the search then trains at its last rate
    again.
    """
    model = Logistic()
    if method in ("fo-ft", "zo-ft"):
        model.requires_grad_(True)
        given = {k: None if k == "adapter_lr" else v for k, v in given.items()}
        given.setdefault("adapter_lr", None)
    options = {"batch_size": batch_size, "num_steps": num_steps, **given}
    setting = Setting(method=method, usual_rate=1e-2, **options)
    most = most_forwards(setting)
    cost = advise(model, loss, batch_of, model.num_rows, setting).cost
    assert cost <= most
    assert most <= max(3 * cost, cost + 100)
    rough = Setting(method=method, usual_rate=3e3, optimizer="sgd", max_grad_norm=None, **options)
    with contextlib.suppress(UserError):  # no rate may be advisable
        assert advise(model, loss, batch_of, model.num_rows, rough).cost <= most


def test_too_few_rows_and_losses_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="has 8 rows"):
        advise(quadratic(), loss, batch_of, 8, Setting())
    model = quadratic()
    with torch.no_grad():
        model.inner.x.fill_(math.inf)
    with pytest.raises(UserError, match="not finite"):
        ask(model)


PROBLEMS = {
    "quadratic": quadratic,
    "stiff": lambda seed: Quadratic([100.0] + [0.1] * 30, [1000.0, 1.0], noise=0.3, seed=seed),
    "noisy": lambda seed: Quadratic([1.0] * 40, [1.0] * 4, noise=3.0, start=0.3, seed=seed),
    "at-the-minimum": lambda seed: Quadratic([1.0] * 20, [1.0], noise=1.0, start=0.0, seed=seed),
    "logistic": lambda seed: Logistic(seed=seed),
}


def runs_well(name, seed, optimizer):
    model = PROBLEMS[name](seed=seed)
    advice = advise(
        model,
        loss,
        batch_of,
        model.num_rows,
        Setting(num_steps=60, optimizer=optimizer, seed=seed, usual_rate=1e-2),
    )
    kind = "AdamW" if optimizer == "adamw" else "SGD"
    before, after = train(model, advice, num_steps=60, seed=seed, optimizer=kind)
    return after < 1.5 * before


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_at_the_advised_rates_does_not_diverge(name, optimizer):
    assert runs_well(name, 0, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_no_run_of_fifty_seeds_diverges(name, optimizer):
    assert [seed for seed in range(50) if not runs_well(name, seed, optimizer)] == []


@pytest.mark.parametrize("method", ["fo-peft", "hybrid"])
def test_a_first_order_block_that_blows_up_at_every_rate_is_refused(method):
    model = quadratic()

    def bad(m, rows):
        shares = m(rows)
        # The loss is finite at the start and NaN once the adapter has moved.
        moved = (m.adapter - before).abs().sum()
        shares = shares + torch.where(moved > 0, torch.nan, 0.0)
        return shares.mean(), shares.detach()

    before = model.adapter.detach().clone()
    asked = {"base_lr": None} if method == "fo-peft" else {}
    with pytest.raises(UserError, match="adapter can be advised"):
        advise(model, bad, batch_of, model.num_rows, Setting(num_steps=60, method=method, **asked))
    assert torch.equal(model.adapter, before)


def test_rates_by_group_leave_neither_what_was_measured_nor_how_far_weights_may_wander(
    monkeypatch,
):
    """The advised rate stays within the measured range and the drift limit.

    This holds even if a split asks for a far larger rate.
    """
    from zofo.advice import advise as module
    from zofo.advice.groups import Split

    monkeypatch.setattr(module, "groups_of", lambda names: {"a": names, "b": names})
    monkeypatch.setattr(
        module, "split_rates", lambda *a, rate, **k: Split({"*": 1e3 * rate}, {}, 9.0, "told")
    )
    advice = ask(quadratic())
    points = (advice.zeroth_start, advice.zeroth_later)
    assert advice.base_lr["*"] <= 1.05 * min(min(p.reach, p.drift) for p in points)


def test_a_direction_a_row_is_measured_along_rank_one_directions_and_given_a_larger_rate():
    def rows_of(m, batch):
        logits = m(input_ids=batch["input_ids"]).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
        ).view(len(logits), -1)
        return losses.mean(), losses.mean(dim=1).detach()

    one = batch_for("llama", rows=1)
    found = {}
    for directions in (1, "rows"):
        # Equal rows agree, so that a direction for each averages over directions.
        found[directions] = advise(
            build("llama", None),
            rows_of,
            lambda rows: {name: tensor.expand(len(rows), -1) for name, tensor in one.items()},
            48,
            Setting(
                method="zo-ft",
                num_steps=20,
                batch_size=8,
                distribution="rank-one",
                directions_per_step=directions,
            ),
        )
    assert found[1].at_start.signal == found["rows"].at_start.signal > 0
    assert found["rows"].zeroth_start.one_step > 2 * found[1].zeroth_start.one_step


def test_a_short_backward_pass_costs_less():
    costs = []
    for share in (1.0, 0.25):
        setting = Setting(num_steps=64, backward_share=share)
        model = quadratic()
        advice = advise(model, loss, batch_of, model.num_rows, setting)
        assert advice.cost <= most_forwards(setting)
        costs.append((advice.cost, setting.forwards_of_run))
    (whole, of_whole), (short, of_short) = costs
    assert short < whole
    assert of_whole - of_short == pytest.approx(64 * 0.75)
