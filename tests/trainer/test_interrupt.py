"""One signal ends training after the step, with a checkpoint. A second signal ends it at once."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from transformers import TrainerCallback

from tests.support.models import assert_same_bits, bits, build
from tests.support.trainers import trainer_for, untimed_logs
from zofo.saved.checkpoint_folders import checkpoints, find_damage
from zofo.trainer.interrupt import StopOnSignal, TrainingInterrupt

CHANGES = {"save_strategy": "steps", "save_steps": 5, "max_steps": 8, "logging_steps": 3}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 4}


class Send(TrainerCallback):
    """Sends a signal to the process at one event of one step."""

    def __init__(self, signum, step, event="on_step_begin", times=1):
        self.signum, self.step, self.times = signum, step, times
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.signum)


ACCUMULATING = {**CHANGES, "gradient_accumulation_steps": 2, "optim": "adamw_torch"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = trainer_for(tmp_path_factory.mktemp("whole"), build("llama", "lora"), **ACCUMULATING)
    trainer.train()
    return trainer


EVENTS = [
    ("on_step_begin", 2, 3),
    ("on_substep_end", 2, 3),
    ("on_step_end", 4, 4),
    ("on_log", 6, 7),
    ("on_save", 5, 5),
]


@pytest.mark.parametrize(
    ("signum", "code", "event", "step", "saved"),
    [
        *((signal.SIGINT, 130, *event) for event in EVENTS),
        (signal.SIGTERM, 143, *EVENTS[0]),
        # Both signals have the same handler.
        *(pytest.param(signal.SIGTERM, 143, *e, marks=pytest.mark.slow) for e in EVENTS[1:]),
    ],
)
def test_the_step_is_finished_and_saved(tmp_path, uninterrupted, signum, code, event, step, saved):
    changes, rest = ACCUMULATING, build("llama", "lora")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop = StopOnSignal()
    # The sender comes first in the list, so that the signal arrives at the event that it names.
    trainer = trainer_for(tmp_path / "b", callbacks=[Send(signum, step, event), stop], **changes)
    with pytest.raises(TrainingInterrupt) as seen, stop:
        trainer.train()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert seen.value.exit_code == code
    assert seen.value.checkpoint == tmp_path / "b" / f"checkpoint-{saved}"
    assert max(checkpoints(tmp_path / "b")) == saved
    assert find_damage(seen.value.checkpoint) is None

    resumed = trainer_for(tmp_path / "b", rest, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(bits(rest), bits(uninterrupted.model))
    assert untimed_logs(resumed) == untimed_logs(uninterrupted)


def test_a_signal_while_the_dev_rows_are_scored(tmp_path):
    stop = StopOnSignal()
    callbacks = [Send(signal.SIGINT, 2, "on_prediction_step"), stop]
    trainer = trainer_for(tmp_path, callbacks=callbacks, **{**CHANGES, **EVALUATING})
    with pytest.raises(TrainingInterrupt) as seen, stop:
        trainer.train()
    assert seen.value.checkpoint == tmp_path / "checkpoint-2"


def test_the_second_signal_stops_at_once(tmp_path):
    stop, model = StopOnSignal(), build("llama", "lora")
    reached = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            reached.append(bits(model))

    callbacks = [Look(), Send(signal.SIGINT, 2, "on_step_begin", times=2), stop]
    trainer = trainer_for(tmp_path, model, callbacks=callbacks, **CHANGES)
    with pytest.raises(TrainingInterrupt) as seen, stop:
        trainer.train()
    assert seen.value.checkpoint is None
    assert not checkpoints(tmp_path)
    assert_same_bits(bits(model), reached[-1])


def test_a_signal_after_the_last_step_is_not_lost(tmp_path):
    stop = StopOnSignal()
    callbacks = [Send(signal.SIGTERM, 8, "on_train_end"), stop]
    trainer = trainer_for(tmp_path, callbacks=callbacks, **CHANGES)
    with pytest.raises(TrainingInterrupt) as seen, stop:
        trainer.train()
    assert seen.value.exit_code == 143


def test_without_handlers_request_does_the_same(tmp_path):
    stop = StopOnSignal()

    class Ask(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                stop.request()

    trainer = trainer_for(tmp_path, callbacks=[Ask(), stop], **CHANGES)
    with pytest.raises(TrainingInterrupt):
        trainer.train()
    assert list(checkpoints(tmp_path)) == [2]


def test_other_threads_install_no_handlers():
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter():
        with StopOnSignal():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopOnSignal():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
