"""The benchmark in order: memory in processes of their own, then steps, then noise kernels."""

from __future__ import annotations

import dataclasses

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from zofo.bench import memory as peaks
from zofo.bench.device import device_name, free_cached, is_out_of_memory
from zofo.bench.results import Memory, NoiseTimes, Results, Row, StepTimes
from zofo.bench.settings import Settings
from zofo.bench.timing import time_rounds, warm_up
from zofo.console import new_progress
from zofo.environment import environment
from zofo.errors import UserError

_REPEATS_ON_ACCELERATOR = 20  # Launching a small kernel takes as long as running it.


def bench(settings: Settings, results: Results, console: Console) -> None:
    """Fill `results` as the settings ask; an interruption keeps what was measured until then.

    Raises:
        UserError: for a model that cannot be found, before anything is measured.
    """
    results.environment = {**environment(), "device": device_name(torch.device(settings.device))}
    if settings.steps:
        from zofo.bench.models import model_facts

        results.model = dataclasses.asdict(model_facts(settings))
        if settings.memory:
            _memory(settings, results, console)
        _steps(settings, results, console)
    if settings.noise:
        _noise(settings, results, console)
    results.is_complete = True


class _Bar:
    """A progress bar that is drawn between samples only."""

    def __init__(self, console: Console, title: str, total: int, unit: str) -> None:
        if not console.is_terminal:
            console.print(f"{title}: {total} {unit}", highlight=False, soft_wrap=True)
        self._progress: Progress = new_progress(console, unit)
        self._progress.live.auto_refresh = False  # A refreshing thread would disturb the samples.
        self._task: TaskID = self._progress.add_task(title, total=total, text="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, name: str) -> None:
        """Count one more sample or process, and show its name."""
        self._progress.update(self._task, advance=1, text=name, refresh=True)


def _memory(settings: Settings, results: Results, console: Console) -> None:
    results.memory = Memory()
    with _Bar(console, "peak memory", peaks.num_processes(settings), "processes") as bar:
        peaks.measure(settings, results.memory, on_done=bar.advance)


def _steps(settings: Settings, results: Results, console: Console) -> None:
    from zofo.bench.contenders import KINDS
    from zofo.bench.models import Workbench

    device = torch.device(settings.device)
    try:
        workbench = Workbench(settings)
        contenders = {name: KINDS[name](workbench) for name in settings.only}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{settings.model} in {settings.dtype} does not fit into the memory of "
            f"{results.environment['device']}; choose a smaller model or a 16-bit dtype"
        ) from error
    for threads in settings.threads:
        torch.set_num_threads(threads)
        rows = {name: Row(c.what, c.forward_equivalents) for name, c in contenders.items()}
        times = StepTimes(threads, rows)
        results.steps.append(times)  # Appended first, so that an interruption keeps the samples.
        num = len(contenders)
        with _Bar(console, f"steps, {threads} thread(s)", num * (1 + settings.rounds), "") as bar:
            warm_up(contenders, device, failed=times.failed, on_done=bar.advance)
            # Optimizers allocate their state in the first step, so its size is read only now.
            for name, contender in contenders.items():
                times.rows[name].state_bytes = contender.state_bytes
            time_rounds(
                contenders, settings.rounds, device, seconds=times.seconds, on_done=bar.advance
            )
    del contenders, workbench
    free_cached(device)


def _noise(settings: Settings, results: Results, console: Console) -> None:
    from zofo.bench.noise import kernels

    device = torch.device(settings.device)
    for threads in settings.threads:
        torch.set_num_threads(threads)
        found = kernels(settings)
        times = NoiseTimes(threads, {name: kernel.num_bytes for name, kernel in found.items()})
        results.noise.append(times)
        num = len(found)
        with _Bar(console, f"noise, {threads} thread(s)", num * (1 + settings.rounds), "") as bar:
            failed: dict[str, str] = {}
            warm_up(found, device, failed=failed, on_done=bar.advance)
            for name in failed:
                del times.num_bytes[name]
            time_rounds(
                found,
                settings.rounds,
                device,
                seconds=times.seconds,
                repeats=1 if device.type == "cpu" else _REPEATS_ON_ACCELERATOR,
                on_done=bar.advance,
            )
