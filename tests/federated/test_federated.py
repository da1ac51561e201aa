"""Rounds of a federated run, without Flower: equal bits, weights, faults, restarts."""

from __future__ import annotations

import functools
import math
import sys

import pytest
import torch

import zofo.federated
from tests.support.models import batch_for, bits, build, loss_of
from zofo.errors import UserError
from zofo.federated import BaseLog, Coordinator, FederatedOptions, LocalData, Party, label_skew
from zofo.federated.base_log import num_bytes
from zofo.federated.exchange import answer, check_protocol, record_of
from zofo.optim.blocks import split_parameters
from zofo.optim.trajectory import Trajectory

OPTIONS = FederatedOptions(num_steps=2, base_lr=1e-3, adapter_lr=1e-2, seed=3)
BY_ROWS = FederatedOptions(
    num_steps=2, base_lr=1e-3, distribution="rank-one", directions_per_step="rows"
)


def shares(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
    ).view(len(logits), -1)
    return losses.mean(1) / len(logits)


def data_of(party, *, num_examples=None, rows=False):
    """The data of a party: batches of its own."""

    def losses(model, seed):
        for i in range(20):
            batch = batch_for("llama", seed=100 * party + i, rows=2 + party % 2)
            yield functools.partial(shares if rows else loss_of, model, batch)

    return LocalData(num_examples or 10 * (party + 1), losses, lambda model: {"accuracy": 0.5})


class Federation:
    """Server and parties in one process; each party has a model and a copy of the log."""

    def __init__(self, num_parties=3, options=OPTIONS, dtype=torch.float32):
        self.make = lambda: build("llama", "lora", dtype=dtype)
        self.options = options
        self.parties = {i: Party(self.make, options) for i in range(num_parties)}
        self.copies = dict.fromkeys(self.parties)
        self.server = Party(self.make, options)
        self.restart(self.server.log.copy())
        self.adapter = self.server.adapter

    def restart(self, log):
        self.coordinator = Coordinator(log)

    @property
    def log(self):
        return self.coordinator.log

    def round(self, asked=None, dead=(), change=None):
        """Ask some parties; `change` may alter the record of one. Return who is left out."""
        asked = list(self.parties) if asked is None else asked
        replies, adapters = {}, {}
        for i, task in self.coordinator.tasks(asked, trains=True).items():
            party = self.parties[i]
            data = data_of(i, rows=self.options.directions_per_step != 1)

            def work(read, party=party, data=data):
                party.adapter = self.adapter
                return record_of(party.train(read.log, data, read.first_step), read.log)

            record, copy = answer(work, party, self.copies[i], task)
            self.copies[i] = copy or self.copies[i]
            if i not in dead:
                record = change(i, record) if change else record
                replies[i], adapters[i] = (record, data.num_examples), party.adapter
        left_out = self.coordinator.join(replies)
        kept = [i for i in adapters if i not in left_out]
        total = sum(replies[i][1] for i in kept)
        for name in self.adapter if kept else ():
            parts = [adapters[i][name] * (replies[i][1] / total) for i in kept]
            self.adapter[name] = torch.stack(parts).sum(0)
        return left_out

    def bases(self):
        """The fingerprint of the base of every party and of the server, at the end of the log."""
        found = []
        for party in (*self.parties.values(), self.server):
            party.follow(self.log)
            found.append(party.base_fingerprint())
        return set(found)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [(OPTIONS, torch.bfloat16), (BY_ROWS, torch.float32)],
    ids=["signs-bfloat16", "rows-float32"],
)
def test_a_dead_party_and_a_late_one_change_no_bit_of_the_bases(options, dtype):
    run = Federation(4, options, dtype)
    original = run.server.base_fingerprint()
    run.round()
    before = run.parties[3].base_fingerprint()
    for number in range(5):  # party 3 misses five rounds, and party 2 dies in the third
        run.round([0, 1, 2] if number < 3 else [0, 1], dead=[2] if number == 2 else ())
    assert run.parties[3].base_fingerprint() == before
    assert run.round([0, 1, 3]) == {}  # it catches up from the log, and takes part at once
    assert len(run.bases()) == 1
    assert original not in run.bases()
    assert len(run.log) == 2 * (4 + 3 + 3 + 2 + 2 + 2 + 3)


def test_the_base_of_a_round_is_the_weighted_mean_of_the_parties_moves():
    run = Federation(2)
    base = {name: p.detach().double().clone() for name, p in run.server.base.items()}
    rows = {}

    def keep(i, record):
        rows[i] = record["scalars"]
        return record

    assert run.round(change=keep) == {}
    run.server.follow(run.log)
    index = split_parameters(run.server.model).base_index
    for name, p in run.server.base.items():
        expected = base[name]
        for i, weight in ((0, 10 / 30), (1, 20 / 30)):
            for step, s in enumerate(rows[i]):
                expected = expected - OPTIONS.base_lr * weight * s * signs(
                    p, index[name], 2 * i + step
                )
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=1e-6)


def signs(parameter, tensor, step):
    """The direction of a weight, from a replay of one update on a weight of zeros."""
    from zofo.optim.trajectory import Update

    drawn = torch.zeros_like(parameter)
    Update(step, (1.0,), -1.0, 0.0).apply(
        [drawn], [tensor], seed=OPTIONS.seed, distribution="rademacher"
    )
    return drawn.double()


def test_local_steps_move_the_adapter_as_fo_peft_does_and_not_the_base():
    moved = []
    for base_lr in (1e-3, 0.0):
        party = Party(
            lambda: build("llama", "lora"),
            FederatedOptions(num_steps=3, base_lr=base_lr, adapter_lr=1e-2),
        )
        base = party.base_fingerprint()
        contribution = party.train(party.log.copy(), data_of(1), 0)
        assert party.base_fingerprint() == base
        assert len(contribution.rows) == (3 if base_lr else 0)
        moved.append(party.adapter)
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in moved[0])


def test_each_party_and_step_has_directions_of_its_own():
    run = Federation(3)
    run.round()
    run.round(dead=[0, 1, 2])
    run.round([0, 2])
    steps = [row[0].step for row in run.log.trajectory.updates]
    assert steps == [*range(6), *range(12, 16)]


def test_no_round_repeats_another_if_the_base_stays():
    run = Federation(2, FederatedOptions(num_steps=2, base_lr=0.0))
    steps = []
    for _ in range(2):
        run.round(change=lambda i, record: steps.append(record["own_first_step"]) or record)
    assert steps == [0, 2, 4, 6]  # They address the rows' order and the dropout masks too.


def test_a_server_goes_on_from_its_saved_log(tmp_path):
    run = Federation(2)
    for _ in range(2):
        run.round()
    run.log.save(tmp_path / "log.safetensors")
    saved = dict(run.adapter)
    run.round()
    expected = run.bases(), {name: t.clone() for name, t in run.adapter.items()}

    run.adapter = saved
    run.restart(BaseLog.load(tmp_path / "log.safetensors"))
    assert run.round() == {}  # the parties have rows that the server has lost, and forget them
    assert run.bases() == expected[0]
    assert all(torch.equal(run.adapter[name], expected[1][name]) for name in run.adapter)
    assert len(Trajectory.load(tmp_path / "log.safetensors")[0]) == 8


def test_a_party_that_lost_its_log_misses_one_round():
    run = Federation(2)
    for _ in range(2):
        run.round()
    run.copies[1] = None
    assert "next round" in run.round()[1]
    assert run.round() == {}
    assert len(run.bases()) == 1


def test_a_new_process_replays_only_the_rows_after_its_copy_of_the_base(tmp_path, monkeypatch):
    run = Federation(2)
    for _ in range(2):
        run.round()
    make = functools.partial(Party, run.make, OPTIONS, snapshots=tmp_path, snapshot_every=4)
    make().follow(run.log)
    starts = []
    replay = Trajectory.replay

    def counted(self, parameters, *, start=0, **options):
        starts.append(start)
        replay(self, parameters, start=start, **options)

    monkeypatch.setattr(Trajectory, "replay", counted)
    run.round()
    starts.clear()
    party = make()
    party.follow(run.log)
    assert starts == [8]
    assert {party.base_fingerprint()} == run.bases()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scalars": [math.nan] * 2}, "not finite"),
        ({"scalars": [1.0] * 3}, "3 local steps instead of 2"),
        ({"scalars": ["a", "b"]}, "0 local steps"),
        ({"position": 1000}, "1000 rows"),
        ({"own_first_step": 0}, "another round"),
        ({"refusal": "out of memory"}, "out of memory"),
    ],
)
def test_a_reply_that_does_not_fit_is_left_out(change, message):
    run = Federation(2)
    run.round()
    left_out = run.round(change=lambda i, record: {**record, **change} if i == 1 else record)
    assert message in left_out[1]
    assert len(run.log) == 6
    assert run.round() == {}
    assert len(run.bases()) == 1


def test_a_party_with_another_base_or_adapter_is_told_so():
    run = Federation(2)
    run.parties[1] = Party(lambda: build("llama", "lora", seed=1), OPTIONS)
    assert "fingerprint" in run.round()[1]
    run.parties[1] = Party(lambda: build("llama", "prompt"), OPTIONS)
    assert "adapter" in run.round()[1]


def test_an_error_in_the_replay_makes_the_base_start_again(monkeypatch):
    run = Federation(1)
    run.round()
    with monkeypatch.context() as patch:

        def broken(self, parameters, **options):
            next(iter(parameters.values())).data.add_(1)
            raise KeyboardInterrupt

        patch.setattr(Trajectory, "replay", broken)
        with pytest.raises(KeyboardInterrupt):
            run.server.follow(run.log)
    assert len(run.bases()) == 1


def test_a_round_sends_eight_bytes_a_scalar_beside_a_constant():
    sizes = {}
    for num_steps in (2, 12):
        run = Federation(2, FederatedOptions(num_steps=num_steps, base_lr=1e-3))
        run.copies = dict.fromkeys(run.parties)
        run.round()
        (task, _) = run.coordinator.tasks([0, 1], trains=True).values()
        sizes[num_steps] = num_bytes(task)
    # two parties with ten steps more each; the digits of the options are the rest
    assert sizes[12] - sizes[2] == 8 * 2 * 10 + 1


def test_options_outside_their_ranges_are_refused_together():
    options = FederatedOptions(num_steps=0, eps=-1.0, optimizer="Adamm", base_every=2)
    with pytest.raises(UserError, match=r"(?s)eps.*Adamm.*num_steps.*base_every"):
        Party(lambda: build("llama", "lora"), options)
    assert FederatedOptions.from_json(OPTIONS.to_json()) == OPTIONS
    with pytest.raises(UserError, match="server's version"):
        FederatedOptions.from_json('{"unknown": 1}')


@pytest.mark.parametrize("name", ["client_app", "HybridStrategy"])
def test_without_flower_the_error_says_what_to_install(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.delitem(sys.modules, "zofo.federated.flower", raising=False)
    with pytest.raises(UserError, match=r"pip install 'zofo\[flower\]'"):
        getattr(zofo.federated, name)


def test_a_server_of_another_version_is_refused():
    with pytest.raises(UserError, match="version 2 of the federated protocol"):
        check_protocol({"protocol": 2})


def test_data_that_end_too_early_are_an_error():
    party = Party(lambda: build("llama", "lora"), FederatedOptions(num_steps=21))
    with pytest.raises(UserError, match="after 20 local steps"):
        party.train(party.log.copy(), data_of(0), 0)


def test_label_skew_deals_every_row_once():
    labels = [i % 2 for i in range(300)]
    parts = label_skew(labels, 10, alpha=0.5, seed=1, min_rows=3)
    assert sorted(row for part in parts for row in part) == list(range(300))
    assert min(map(len, parts)) >= 3
    shares = [sum(labels[row] for row in part) / len(part) for part in parts]
    assert max(shares) - min(shares) > 0.4
    assert parts == label_skew(labels, 10, alpha=0.5, seed=1, min_rows=3)
    with pytest.raises(UserError, match="alpha"):
        label_skew(labels, 10, alpha=0.0)


def test_a_model_follows_the_log_as_a_replay_does():
    run = Federation(2)
    run.round()
    model = build("llama", "lora")
    run.log.trajectory.replay(split_parameters(model).base)
    run.server.follow(run.log)
    whole, own = bits(model), bits(run.server.model)
    assert all(torch.equal(whole[name], own[name]) for name in whole if "lora" not in name)
