"""Tests of the training clock with a fake time."""

import pytest

import zofo.run.task_trainer
from zofo.run.task_trainer import TrainingClock


@pytest.fixture
def now(monkeypatch):
    class Time:
        value = 100.0

    time = Time()
    monkeypatch.setattr(zofo.run.task_trainer.time, "monotonic", lambda: time.value)
    return time


def test_it_counts_from_the_start_but_for_pauses(now):
    clock = TrainingClock()
    assert clock.seconds == 0
    clock.start()
    now.value += 3
    with clock.paused():
        now.value += 10
        assert clock.seconds == 3
        with clock.paused():
            now.value += 10
        now.value += 5
        assert clock.seconds == 3
    now.value += 2
    assert clock.seconds == 5


def test_it_goes_on_after_errors_and_where_an_earlier_run_stopped(now):
    clock = TrainingClock()
    clock.start(40.0)
    now.value += 1

    def fail():
        with clock.paused():
            now.value += 10
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    now.value += 1
    assert clock.seconds == 42


def test_a_pause_before_the_start_does_not_start_it(now):
    clock = TrainingClock()
    with clock.paused():
        now.value += 1
    now.value += 1
    assert clock.seconds == 0
