"""The base moves every k-th step. The steps between move the adapter alone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from transformers import TrainerCallback

from tests.support.models import assert_same_bits, batch_for, bits, build, loss_of
from tests.support.smooth import (
    Net,
    adapter_of,
    base_of,
    directions_of,
    moved_along,
    optimizer_for,
    rows,
)
from tests.support.trainers import Rows, history, trainer_for, untimed_logs
from zofo.config.checks import idle_options
from zofo.config.load import load_config
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.optim.trajectory import Trajectory
from zofo.run.cost import forward_equivalents


def test_the_base_moves_in_every_kth_step_from_the_first():
    net, x = Net(), rows(8)
    optimizer, calls = optimizer_for(net, base_every=3), []

    def closure():
        calls.append(optimizer.step_count)
        return net(x)

    for step in range(8):
        start, v = copy.deepcopy(net), directions_of(net, step=step)
        loss = optimizer.step(closure)
        with torch.no_grad():
            assert float(loss) == optimizer.last_step.loss == float(start(x))
            slope = float(moved_along(start, v, 1e-3)(x) - start(x)) / 1e-3
        if step % 3 == 0:
            (s,) = optimizer.last_step.projected_grad
            assert s == pytest.approx(slope, rel=1e-8)
            expected = base_of(moved_along(start, v, -0.3 * s))
            torch.testing.assert_close(base_of(net), expected, rtol=1e-9, atol=1e-12)
        else:
            assert optimizer.last_step.projected_grad == ()
            assert optimizer.last_step.num_forwards == 0
            assert_same_bits(base_of(net), base_of(start))
        assert optimizer.last_measured.step == step - step % 3
        old = adapter_of(start)
        assert all(not torch.equal(old[n], p) for n, p in adapter_of(net).items())
    # The first step evaluates the loss once more, to see whether it repeats.
    assert calls == [0, 0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7]
    assert optimizer.num_forwards == 3
    assert [row[0].step for row in optimizer.trajectory.updates] == [0, 3, 6]


def test_a_step_between_is_fo_peft_bit_for_bit():
    """The generator ends in the same state as well, so later steps draw the same masks."""
    ours = build("llama", "lora", lora_dropout=0.3).train()
    optimizer = optimizer_for(ours, base_lr=1e-3, base_every=2)
    optimizer.step(lambda: loss_of(ours, batch_for("llama")))
    twin = copy.deepcopy(ours)
    plain = optimizer_for(twin, "fo-peft")
    generator = torch.get_rng_state()
    first = optimizer.step(lambda: loss_of(ours, batch_for("llama", seed=5)))
    after = torch.get_rng_state()
    torch.set_rng_state(generator)
    assert torch.equal(plain.step(lambda: loss_of(twin, batch_for("llama", seed=5))), first)
    assert torch.equal(torch.get_rng_state(), after)
    assert_same_bits(bits(ours), bits(twin))


def test_micro_batches_of_a_step_between_measure_nothing():
    net, x = Net(), rows(8)
    optimizer = optimizer_for(net, base_every=2)
    for _ in range(2):
        before = base_of(net)
        optimizer.zero_grad()
        for part in x.split(4):
            optimizer.accumulate(lambda part=part: net(part) / 2)
        assert optimizer.step() is None
    assert_same_bits(base_of(net), before)
    assert optimizer.num_forwards == 2
    with pytest.raises(ValueError, match="nothing was measured"):  # Step 2 moves the base.
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_every", [2, 3])
def test_replay_and_resume_give_the_same_bits(tmp_path, dtype, base_every):
    total = 7

    def run(model, optimizer, steps):
        for t in steps:
            torch.manual_seed(t)
            optimizer.step(lambda t=t: loss_of(model, batch_for("llama", seed=t)))

    def start(model):
        return optimizer_for(model, base_lr=1e-2, base_every=base_every, optimizer="AdamW")

    original = build("llama", "lora", dtype=dtype, lora_dropout=0.1).train()
    whole = copy.deepcopy(original)
    optimizer = start(whole)
    run(whole, optimizer, range(total))
    optimizer.trajectory.save(tmp_path / "t.safetensors")
    loaded, _ = Trajectory.load(tmp_path / "t.safetensors")
    assert loaded == optimizer.trajectory
    replayed = copy.deepcopy(original)
    before = base_of(replayed)
    loaded.replay(split_parameters(replayed).base)
    assert_same_bits(base_of(replayed), base_of(whole))
    assert any(not torch.equal(p, before[n]) for n, p in base_of(replayed).items())

    for cut in range(1, total):
        half = copy.deepcopy(original)
        first = start(half)
        run(half, first, range(cut))
        file = io.BytesIO()
        torch.save((first.state_dict(), half.state_dict()), file)
        file.seek(0)
        state, weights = torch.load(file, weights_only=True)
        rest = copy.deepcopy(original)
        rest.load_state_dict(weights)
        second = start(rest)
        second.load_state_dict(state)
        assert second.last_measured == first.last_measured
        run(rest, second, range(cut, total))
        assert_same_bits(bits(rest), bits(whole))
        assert second.num_forwards == optimizer.num_forwards
        assert second.last_measured == optimizer.last_measured


class KilledError(Exception):
    pass


@pytest.mark.parametrize("killed_at", [2, 4, 5])
def test_an_interrupted_trainer_ends_as_the_uninterrupted(tmp_path, killed_at):
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == killed_at:
                raise KilledError

    changes = {
        "base_every": 3,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 1,
        "optim": "adamw_torch",
        "gradient_accumulation_steps": 2,
    }
    whole, rest = (build("llama", "lora", lora_dropout=0.3) for _ in range(2))
    uninterrupted = trainer_for(tmp_path / "a", whole, **changes)
    uninterrupted.train()
    first = build("llama", "lora", lora_dropout=0.3)
    with pytest.raises(KilledError):
        trainer_for(tmp_path / "b", first, callbacks=[Kill()], **changes).train()
    resumed = trainer_for(tmp_path / "b", rest, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(bits(rest), bits(whole))
    assert untimed_logs(resumed) == untimed_logs(uninterrupted)
    assert resumed.trajectory == uninterrupted.trajectory
    assert [row[0].step for row in resumed.trajectory.updates] == [0, 3, 6]


def test_logs_give_the_last_measured_scalar_and_count_what_was_spent(tmp_path):
    trainer = trainer_for(tmp_path, base_every=2)
    trainer.train()
    scalars = [row[0].projected_grad[0] for row in trainer.trajectory.updates]
    assert len(scalars) == 2
    assert history(trainer, "projected_grad") == [scalars[0]] * 2 + [scalars[1]] * 2
    assert history(trainer, "zo_forwards") == [1, 1, 2, 2]
    assert history(trainer, "forward_equivalents") == [3, 5, 8, 10]
    norms = history(trainer, "base_update_norm")
    assert norms[0] == norms[1] != norms[2] == norms[3]
    # A log at every second step still contains the quantities of the base.
    rare = trainer_for(tmp_path, base_every=2, logging_steps=2)
    rare.train()
    assert history(rare, "projected_grad") == scalars


def test_a_loss_that_is_not_repeatable_is_refused_after_a_resume_between(tmp_path):
    """After a resume, the repeatability check waits for the first step with a difference."""
    trainer_for(tmp_path, base_every=3, save_strategy="steps", save_steps=1, max_steps=2).train()

    from zofo.trainer.mixin import HybridTrainer

    class Counting(HybridTrainer):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            return super().compute_loss(*args, **kwargs) * self.calls

    resumed = trainer_for(tmp_path, cls=Counting, base_every=3, max_steps=5, rows=Rows())
    with pytest.raises(UserError, match="computed again"):
        resumed.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("method", ["zo-peft", "zo-ft"])
def test_without_a_first_order_block_the_steps_between_would_do_nothing(tmp_path, method):
    message = f"base_every is 2.*{method}"
    model = build("llama", "lora" if method == "zo-peft" else None)
    with pytest.raises(UserError, match=r"base_every is 2.*first-order"):
        optimizer_for(copy.deepcopy(model), method, base_every=2)
    with pytest.raises(UserError, match=f"{method}.*base_every=2"):
        trainer_for(tmp_path, model, method=method, base_every=2)
    with pytest.raises(UserError, match=message):
        load_config(overrides=[f"method={method}", "base_every=2"])
    load_config(overrides=[f"method={method}", "base_every=1"])


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_a_base_every_that_counts_no_steps_is_refused(value):
    with pytest.raises(UserError, match=f"base_every is {value}"):
        optimizer_for(Net(), base_every=value)
    with pytest.raises(UserError, match=f"base_every is {value}"):
        load_config(overrides=[f"base_every={value}"])


def test_without_a_zeroth_order_block_it_has_no_effect():
    config = load_config(overrides=["method=fo-peft", "base_every=2"])
    assert idle_options(config) == ["base_every has no effect with method fo-peft"]
    assert idle_options(load_config(overrides=["base_every=2"])) == []


@pytest.mark.parametrize(("steps", "cost"), [(9, 21), (10, 24), (1, 3)])
def test_cost(steps, cost):
    """The gradient costs two forwards per step, and steps 0, 3, 6 and 9 cost one more."""
    assert forward_equivalents(load_config(overrides=["base_every=3"]), steps) == cost
