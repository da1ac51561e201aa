"""Tests of local constants along a path.

The answers are known, and measuring does not change the training.
"""

import json

import pytest
import torch

from tests.support.dense import Quadratic, blocks_of_quadratic, objective_of, symmetric
from tests.support.models import assert_same_bits, bits, build
from tests.support.trainers import Recorder, history, trainer_for, untimed_logs
from zofo.errors import UserError
from zofo.smoothness.objective import norm, objective_of_trainer
from zofo.smoothness.path import SmoothnessRecorder, local_constants
from zofo.smoothness.summary import series_of

HESSIAN = symmetric([-2.0, 0.1, 0.5, 1.0, 3.0, 20.0])


def test_constants_of_a_quadratic_are_those_of_its_blocks():
    model = Quadratic(HESSIAN, 4)
    w = torch.cat([model.x, model.y]).detach()
    step = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    after = {model.x: w[:4] + step[:4], model.y: w[4:] + step[4:]}
    found = local_constants(
        objective_of(model),
        blocks_of_quadratic(model),
        {model.x: w[:4], model.y: w[4:]},
        after,
        gammas=(0.5, 1.0),
        rounding={"base": 1e-15, "adapter": 1e-15},
    )
    gradient = HESSIAN @ w + model.slope
    change, length = HESSIAN @ step, step.norm()
    parts = {"base": slice(0, 4), "adapter": slice(4, 6)}
    assert found["loss"] == pytest.approx(model().item())
    assert found["grad_norm"]["full"] == pytest.approx(float(gradient.norm()))
    for entry in found["whole"]:  # A quadratic has the same constants at every γ.
        assert entry["full"] == pytest.approx(float(change.norm() / length))
        assert entry["step_curvature"] == pytest.approx(float(step @ HESSIAN @ step))
        for block, part in parts.items():
            assert entry[block] == pytest.approx(float(change[part].norm() / length))
    for block, part in parts.items():
        own = HESSIAN[part, part]
        expected = float((own @ step[part]).norm() / step[part].norm())
        assert [e[block] for e in found["alone"]] == pytest.approx([expected] * 2)
        unit = gradient[part] / gradient[part].norm()
        assert found["gradient"][block]["norm"] == pytest.approx(float((own @ unit).norm()))
        assert found["gradient"][block]["curvature"] == pytest.approx(float(unit @ own @ unit))
        assert found["grad_norm"][block] == pytest.approx(float(gradient[part].norm()))
        assert found["floor"][block] < 1e-12
    assert model.x.grad is None


def test_a_block_that_stands_still_has_no_constant():
    model = Quadratic(HESSIAN, 4)
    before = {model.x: model.x.detach(), model.y: model.y.detach()}
    after = {model.x: model.x.detach(), model.y: model.y.detach() + 0.1}
    found = local_constants(objective_of(model), blocks_of_quadratic(model), before, after)
    assert found["alone"][0]["base"] is None
    assert found["alone"][0]["adapter"] == pytest.approx(
        float((HESSIAN[4:, 4:] @ torch.ones(2).double()).norm() / 2**0.5)
    )
    rounding = {"base": 1e-3, "adapter": 1e-3}
    told = local_constants(
        objective_of(model), blocks_of_quadratic(model), before, after, rounding=rounding
    )
    # Over the whole step, rounding also shows in the block that stood still.
    length = told["step_norm"]["full"]
    assert "base" not in told["floor"]
    assert told["floor_whole"] == pytest.approx(
        {b: 1e-3 * told["grad_norm"][b] / length for b in rounding}
    )
    point = {**told, "step": 0, "whole": [{**told["whole"][0], "base": 5e-3}]}
    point["grad_norm"] = {**point["grad_norm"], "full": 1.0}
    point["floor_whole"]["base"] = 1e-3
    assert series_of([point], "whole", "base") == []
    point["floor_whole"]["base"] = 1e-4
    assert series_of([point], "whole", "base") == [(0, 1.0, 5e-3)]
    still = local_constants(objective_of(model), blocks_of_quadratic(model), before, before)
    assert still["whole"] == []


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_training_does_not_notice_the_recorder(tmp_path, adapter):
    def run(measured):
        seen = Recorder()
        model = build("opt", adapter)  # OPT has dropout, so the state of the generators matters.
        trainer = trainer_for(tmp_path / str(measured), model, callbacks=[seen])
        recorder = SmoothnessRecorder(trainer, num_rows=3, every=2, split="layer")
        if measured:
            trainer.add_callback(recorder)
        trainer.train()
        return trainer, seen, recorder, torch.get_rng_state()

    with_it, seen, recorder, generator = run(True)
    without, plain, _, generator_without = run(False)
    assert history(with_it, "loss") == history(without, "loss")
    assert untimed_logs(with_it) == untimed_logs(without)
    for step, weights in seen.weights.items():
        assert_same_bits(weights, plain.weights[step])
    assert torch.equal(generator, generator_without)
    # The recorder read its three rows first.
    assert with_it.train_dataset.seen[3:] == without.train_dataset.seen
    assert [p["step"] for p in recorder.points] == [0, 2]
    for point in recorder.points:
        assert (
            point["whole"][0]["layer 0"] <= point["whole"][0]["base"] <= point["whole"][0]["full"]
        )
        assert point["gradient"]["base"]["norm"] > 0
        assert point["floor"]["base"] < point["alone"][0]["base"]
    frozen = {n: p.requires_grad for n, p in with_it.model.named_parameters()}
    assert frozen == {n: p.requires_grad for n, p in without.model.named_parameters()}
    assert all(p.grad is None for p in with_it.model.parameters() if not p.requires_grad)


def test_points_are_kept_and_not_measured_again(tmp_path):
    path = tmp_path / "points.jsonl"
    trainer = trainer_for(tmp_path / "a", max_steps=2)
    trainer.add_callback(SmoothnessRecorder(trainer, num_rows=2, path=path, along_gradient=False))
    trainer.train()
    lines = path.read_text().splitlines()
    kinds = [(r["kind"], r["step"]) for r in map(json.loads, lines)]
    assert kinds == [("rounding", 0), ("path", 0), ("path", 1)]
    # This simulates a kill in the middle of a line.
    path.write_text("\n".join([*lines[:2], lines[2][:40]]))
    told = []
    again = trainer_for(tmp_path / "b", max_steps=2)
    recorder = SmoothnessRecorder(
        again, num_rows=2, path=path, along_gradient=False, on_point=told.append
    )
    again.add_callback(recorder)
    again.train()
    assert [point["step"] for point in told] == [1]
    assert path.read_text().splitlines() == lines


def test_the_gradient_of_a_trainers_rows_is_autograds(tmp_path):
    trainer = trainer_for(tmp_path, build("llama", "lora"))
    before = bits(trainer.model)
    objective = objective_of_trainer(trainer, num_rows=5, batch_size=5)
    parameters = dict(trainer.model.named_parameters())
    value, gradient = objective.gradient(parameters)
    with objective.measuring():
        for p in parameters.values():
            p.requires_grad_(True)
        loss = trainer.compute_loss(trainer.model, dict(objective.batches[0]))
        expected = torch.autograd.grad(loss, list(parameters.values()))
    assert value == pytest.approx(float(loss.detach()))
    assert objective.value() == pytest.approx(value)
    for g, e in zip(gradient.values(), expected, strict=True):
        assert torch.equal(g, e)
    assert 0 < objective.rounding(parameters) < 1e-5
    assert norm(gradient) > 0
    assert_same_bits(bits(trainer.model), before)


def test_wrong_options_are_said_together(tmp_path):
    trainer = trainer_for(tmp_path)
    with pytest.raises(UserError, match=r"every is 0.*gammas is \[2\.0\]"):
        SmoothnessRecorder(trainer, every=0, gammas=[2.0])


def test_half_precision_is_refused(tmp_path):
    trainer = trainer_for(tmp_path, build("llama", "lora", dtype=torch.bfloat16))
    objective = objective_of_trainer(trainer, num_rows=2)
    with pytest.raises(UserError, match="dtype=float32"):
        objective.gradient(dict(trainer.model.named_parameters()))
