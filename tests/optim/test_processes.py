"""Processes that take each step together: equal bits, equal directions, and what is refused."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tests.support.groups import in_group
from tests.support.models import batch_for, bits, build
from zofo.errors import UserError
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.processes import Processes

ROWS = 6
DENSE = {"distribution": "rademacher"}
BY_ROWS = {"distribution": "rank-one", "directions_per_step": "rows"}
SHARED = {"distribution": "rank-one", "directions_per_step": 4}


def step_of(model, whole, *, num_micro_batches=1, **options):
    """An optimizer, and a function that takes a step on this process's rows of `whole`."""
    group = dist.group.WORLD if dist.is_initialized() else None
    rank, size = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
    has_adapter = hasattr(model, "peft_config")
    outer = DistributedDataParallel(model) if group and has_adapter else model
    method = "hybrid" if has_adapter else "zo-ft"
    optimizer = HybridOptimizer(
        param_groups(model, method, base_lr=1e-3, adapter_lr=1e-2),
        model,
        optimizer="AdamW",
        process_group=group,
        **options,
    )

    def take():
        for part in range(num_micro_batches):
            # As accelerate deals rows: one micro-batch after another, rank after rank within each.
            place = part * size + rank
            num_rows = ROWS // (size * num_micro_batches)
            batch = {k: v[place * num_rows : (place + 1) * num_rows] for k, v in whole.items()}

            def shares(batch=batch):
                inputs = {k: v for k, v in batch.items() if k != "labels"}
                logits = outer(**inputs).logits[:, :-1]
                losses = functional.cross_entropy(
                    logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
                ).view(len(logits), -1)
                return losses.mean(1) / len(logits) / num_micro_batches

            optimizer.accumulate(shares)
        optimizer.step()

    return optimizer, take


def train(adapter, options, num_steps, num_micro_batches=1):
    """Train; return a digest of all bits, all scalars, and the bytes that were sent."""
    model, whole = build("llama", adapter), batch_for("llama", rows=ROWS)
    optimizer, take = step_of(model, whole, num_micro_batches=num_micro_batches, **options)
    scalars, losses = [], []
    for _ in range(num_steps):
        take()
        scalars.append(list(optimizer.last_step.projected_grad))
        losses.append(optimizer.last_step.loss)
        optimizer.zero_grad()
    whole_bits = {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in bits(model).items()
    }
    sent = 0 if optimizer.processes is None else optimizer.processes.bytes_sent
    return {"bits": whole_bits, "scalars": scalars, "losses": losses, "sent": sent}


@pytest.mark.parametrize("options", [DENSE, BY_ROWS, SHARED], ids=["dense", "rows", "shared"])
@pytest.mark.parametrize("adapter", ["lora", None], ids=["lora", "none"])
def test_all_processes_hold_the_same_bits_and_agree_with_one(options, adapter):
    alone = train(adapter, options, 4)
    for size in (2, 3):
        found = in_group(size, train, adapter, options, 20)
        assert all(part["bits"] == found[0]["bits"] for part in found)
        assert all(part["scalars"] == found[0]["scalars"] for part in found)
        # Rounding grows from step to step, so the first ones are compared.
        first = torch.tensor(found[0]["scalars"][:4])
        torch.testing.assert_close(first, torch.tensor(alone["scalars"]), rtol=2e-2, atol=2e-2)
        assert found[0]["losses"][:4] == pytest.approx(alone["losses"], rel=1e-4)
        assert len(set(found[0]["scalars"][0])) == len(alone["scalars"][0])


def test_rows_are_numbered_in_the_batch_of_all_processes():
    alone = train(None, BY_ROWS, 2, num_micro_batches=2)
    for found in in_group(3, train, None, BY_ROWS, 2, 2):
        torch.testing.assert_close(
            torch.tensor(found["scalars"]), torch.tensor(alone["scalars"]), rtol=2e-2, atol=2e-2
        )


@pytest.mark.parametrize(
    ("options", "num_directions", "num_bytes"),
    [
        (DENSE, 1, 8 + 8),
        ({**DENSE, "num_directions": 3}, 3, 3 * 8 + 8),
        (BY_ROWS, ROWS, 3 * 8 + 8 + 4),  # half of the rows, and their number
        (SHARED, 4, 4 * 8 + 8 + 4),
    ],
    ids=["dense", "three", "rows", "shared"],
)
def test_a_step_sends_at_most_sixteen_bytes_for_each_direction(options, num_directions, num_bytes):
    begin, end = (in_group(2, train, None, options, steps)[0]["sent"] for steps in (1, 3))
    assert end - begin == 2 * num_bytes
    assert num_bytes <= 16 * num_directions


def test_three_processes_send_to_two_others():
    assert [part["sent"] for part in in_group(3, train, None, DENSE, 1)] == [2 * 16] * 3


def with_other(key, value):
    """The error of a process whose setting, weight or loss differs on rank 1."""
    options = dict(DENSE)
    model, whole = build("llama", None), batch_for("llama", rows=ROWS)
    if dist.get_rank() == 1:
        if key == "weight":
            with torch.no_grad():
                model.model.norm.weight[3] += value
        else:
            options[key] = value
    before = bits(model)
    _, take = step_of(model, whole, **options)
    try:
        take()
    except UserError as error:
        is_unmoved = all(torch.equal(before[n], p) for n, p in bits(model).items())
        return f"{error} / unmoved: {is_unmoved}"
    return "no error"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("eps", 1e-2, "eps: 0.001 and 0.01"),
        ("seed", 7, "seed: 0 and 7"),
        ("weight", 1e-3, "weight model.norm.weight"),
    ],
)
def test_processes_that_begin_differently_are_refused_on_every_process(key, value, said):
    for message in in_group(2, with_other, key, value):
        assert said in message
        assert "process 0 and process 1 begin with different values" in message
        assert message.endswith("unmoved: True")


def drift(num_steps):
    """The error after one weight of rank 1 changes in one bit, and when it came."""
    model, whole = build("llama", None), batch_for("llama", rows=ROWS)
    _, take = step_of(model, whole, **DENSE)
    take()
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.model.norm.weight.view(torch.int32)[3] ^= 1 << 12
    for step in range(num_steps):
        try:
            take()
        except UserError as error:
            return f"{step}: {error}"
    return "no error"


def test_a_bit_that_differs_ends_the_run_and_its_weight_is_named():
    num_weights = len(list(build("llama", None).parameters()))
    first, second = in_group(2, drift, num_weights)
    assert first == second
    assert "differ between processes" in first
    assert "model.norm.weight" in first


def missed_bits(dtype):
    """The bits of an element whose change on rank 1 is not noticed."""
    layer = nn.Linear(1, 5, bias=False, dtype=dtype)
    nn.init.constant_(layer.weight, 0.3)
    own = Processes(dist.group.WORLD, layer)
    as_bytes, missed = layer.weight.data.view(torch.uint8).flatten(), []
    own.joined(None, None, (), step=0, settings=dict)
    for bit in range(8 * dtype.itemsize):
        at = 3 * dtype.itemsize + bit // 8
        as_bytes[at] ^= dist.get_rank() << bit % 8
        *_, differs = own.joined(None, None, (), step=0, settings=dict)
        missed += [] if differs else [bit]
        as_bytes[at] ^= dist.get_rank() << bit % 8
    *_, differs = own.joined(None, None, (), step=0, settings=dict)
    return [*missed, "equal"] if differs else missed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_change_of_any_one_bit_is_noticed(dtype):
    assert in_group(2, missed_bits, dtype) == [[], []]


def with_nan():
    """Whether a step whose loss is not finite on rank 1 moved a weight."""
    model = build("llama", "lora")
    before = bits(model)
    optimizer = HybridOptimizer(
        param_groups(model, "hybrid", base_lr=1e-3, adapter_lr=1e-2),
        model,
        process_group=dist.group.WORLD,
        self_check=False,
    )
    factor = float("nan") if dist.get_rank() == 1 else 1.0
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step(lambda: model(**batch_for("llama")).loss * factor)
    return [n for n, p in bits(model).items() if not torch.equal(p, before[n])]


def test_a_loss_that_is_not_finite_on_one_process_moves_none():
    assert in_group(2, with_nan) == [[], []]
