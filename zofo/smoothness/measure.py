"""Measure a run: spectra, directions and the majoriser at some steps, constants along the path.

    smoothness.yaml     the configuration of the run and of the measurement
    smoothness.jsonl    every measurement, as it was made
    smoothness.json     all measurements with fits and verdicts
    smoothness.html     the page

These files lie in the run folder, or in a folder of their own if nothing is trained. A measurement
in the file is never repeated. An interrupted run continues from its newest checkpoint, and it keeps
all measurements, because the continued run is the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from transformers import TrainerCallback

from zofo.config.schema import RunConfig
from zofo.console import plain_console
from zofo.disk.files import write_json, write_text
from zofo.disk.yaml import yaml_text
from zofo.errors import UserError
from zofo.optim.methods import apply_method
from zofo.perturb.view import Perturbation
from zofo.run.prepare import Prepared, default_name, prepare, run_folder
from zofo.run.resume import is_finished
from zofo.run.train import train_in
from zofo.smoothness.blocks import Block, blocks_of, require_derivatives
from zofo.smoothness.directional import directional_curvature
from zofo.smoothness.majoriser import check_majoriser
from zofo.smoothness.objective import Objective, choose_rows, objective_of_trainer
from zofo.smoothness.options import (
    SECTION,
    SmoothnessOptions,
    load_smoothness,
    path_steps,
    point_steps,
)
from zofo.smoothness.path import SmoothnessRecorder
from zofo.smoothness.records import Records, finite
from zofo.smoothness.spectrum import measure_spectrum
from zofo.smoothness.summary import FILE, summarise
from zofo.trainer.interrupt import StopOnSignal, TrainingInterrupt

OPTIONS_FILE: Final = "smoothness.yaml"
RECORDS_FILE: Final = "smoothness.jsonl"
PAGE_FILE: Final = "smoothness.html"


def measure_point(
    objective: Objective,
    blocks: Mapping[str, Block],
    options: SmoothnessOptions,
    records: Records,
    step: int,
    *,
    eps: float = 1e-3,
    seed: int = 0,
    distribution: Any = "rademacher",
    say: Callable[[str], Any] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Measure spectra, directional curvature and the majoriser at the current weights.

    Args:
        objective: f.
        blocks: name -> block, as from `blocks_of`.
        options: what is measured, and how much of it.
        records: receives the measurements; those that it already has are skipped.
        step: number of optimizer steps done.
        eps: smoothing radius of the directions.
        seed: seed of the run, so that the directions are those that the run draws next.
        distribution: distribution of the directions.
        say: receives a line of text for each measurement.
        should_stop: asked before each measurement. A continued run makes the measurements that are
            missing.
    """

    def is_due(kind: str, name: str = "") -> bool:
        return not should_stop() and not records.has(kind, step, name)

    def add(kind: str, found: Mapping[str, Any], forwards: float) -> None:
        records.add({"kind": kind, "step": step, **found, "forwards": forwards})

    for name, block in blocks.items():
        about = {"block": name, "is_part": block.is_part, "num_parameters": block.num_parameters}
        before = objective.num_forwards
        if options.lanczos_steps and is_due("spectrum", name):
            found = _spectrum(objective, block, options)
            add("spectrum", about | found, objective.num_forwards - before)
            say(
                f"step {step}, {name}: eigenvalues {found['bottom']['value']:.3g} to "
                f"{found['top']['value']:.3g}, trace {found['trace'].value:.3g}"
            )
        if options.directions and is_due("directional", name):
            parameters = list(block.parameters.values())
            curvature = directional_curvature(
                objective.value,
                Perturbation(
                    objective.model, parameters, block.tensors, seed=seed, distribution=distribution
                ),
                parameters,
                eps=eps,
                step=step,
                num_directions=options.directions,
            )
            found = vars(curvature) | {
                "trace": curvature.trace,
                "squared_gradient": curvature.squared_gradient,
            }
            forwards = found.pop("num_forwards")
            add("directional", about | found, forwards)
    mains = {name: block for name, block in blocks.items() if not block.is_part}
    if options.majoriser and options.lanczos_steps and len(mains) > 1 and is_due("majoriser"):
        _test_majoriser(objective, mains, options, records, step, say)


def _spectrum(objective: Objective, block: Block, options: SmoothnessOptions) -> dict[str, Any]:
    from zofo.smoothness.hessian import BlockHessian

    found = measure_spectrum(
        BlockHessian(objective, block.parameters),
        _like(block),
        num_steps=options.lanczos_steps,
        num_probes=options.probes,
        method=options.trace,
        seed=options.seed,
        memory_bytes=options.memory_bytes,
    )
    return {
        "top": vars(found.top),
        "bottom": vars(found.bottom),
        "norm": found.norm,
        "trace": found.trace,
        "squared_norm": found.squared_norm,
        "effective_rank": found.effective_rank,
        "stable_rank": found.stable_rank,
        "ritz": [
            {"values": ritz.values.tolist(), "weights": ritz.weights.tolist()}
            for ritz in found.ritz
        ],
        "kept_vectors": found.ritz[0].is_orthogonal,
    }


def _test_majoriser(
    objective: Objective,
    mains: Mapping[str, Block],
    options: SmoothnessOptions,
    records: Records,
    step: int,
    say: Callable[[str], Any],
) -> None:
    from zofo.smoothness.hessian import BlockHessian

    spectra = {r["block"]: r for r in records.of("spectrum") if r["step"] == step}
    # Ritz values lie within the spectrum, so the residual is added to bound the norm from above.
    constants = {
        name: spectra[name]["norm"]
        + max(spectra[name][end]["residual"] for end in ("top", "bottom"))
        for name in mains
    }
    if not all(constants.values()):
        records.add({"kind": "majoriser", "step": step, "constants": constants, "kappa": None})
        return
    before = objective.num_forwards
    parameters = {n: p for block in mains.values() for n, p in block.parameters.items()}
    operator = BlockHessian(objective, parameters)
    _, gradient = operator.graph.gradient()
    found = check_majoriser(
        operator,
        {name: block.num_parameters for name, block in mains.items()},
        constants,
        _like(next(iter(mains.values()))),
        num_steps=options.lanczos_steps,
        vectors=[operator.flat(gradient)],
        num_samples=3,
        seed=options.seed,
        memory_bytes=options.memory_bytes,
    )
    values = {key: value for key, value in vars(found).items() if key != "num_products"}
    spent = {"verdict": found.verdict, "forwards": objective.num_forwards - before}
    records.add({"kind": "majoriser", "step": step, **values, **spent})
    say(f"step {step}, majoriser of the blocks' own norms: kappa {found.kappa:.3g}")


def _like(block: Block) -> torch.Tensor:
    """An empty tensor with the dtype and device of a block."""
    return next(iter(block.parameters.values())).detach().new_empty(0)


class PointRecorder(TrainerCallback):
    """Calls `measure_point` after some steps of a trainer with zofo's `HybridMixin`.

    Args:
        trainer: the trainer.
        objective: returns f; it is called after training began.
        steps: numbers of optimizer steps after which to measure.
        options, records, say: as for `measure_point`.
        stop: knows whether a signal arrived; no measurement starts afterwards.
    """

    def __init__(
        self,
        trainer: Any,
        objective: Callable[[], Objective],
        steps: list[int],
        options: SmoothnessOptions,
        records: Records,
        say: Callable[[str], Any],
        stop: StopOnSignal | None = None,
    ) -> None:
        self.trainer, self.objective, self.steps = trainer, objective, set(steps)
        self.options, self.records, self.say, self.stop = options, records, say, stop

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure before the first step.

        Raises:
            TrainingInterrupt: if a signal arrived, because before a step there is nothing to save.
        """
        self._measure(state.global_step)
        if self.stop is not None and self.stop.signum is not None:
            raise TrainingInterrupt(self.stop.signum)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after a step."""
        self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        if step not in self.steps:
            return
        optimizer = self.trainer.hybrid_optimizer
        with self.trainer.clock.paused():
            measure_point(
                self.objective(),
                blocks_of(self.trainer.model, self.options.split),
                self.options,
                self.records,
                step,
                eps=optimizer.options.eps,
                seed=optimizer.seed,
                distribution=optimizer.options.distribution,
                say=self.say,
                should_stop=lambda: self.stop is not None and self.stop.signum is not None,
            )


def measure_run(
    config: RunConfig,
    options: SmoothnessOptions,
    *,
    resume: Path | None = None,
    console: Console | None = None,
    on_start: Callable[[Path], None] | None = None,
    stop: StopOnSignal | None = None,
) -> Path:
    """Train and measure, or only measure; write records, summary and page. Return the folder.

    Args:
        config: configuration of the run.
        options: what is measured.
        resume: a folder to continue.
        console: where progress is printed; stderr by default.
        on_start: called with the folder as soon as something is written there.
        stop: handles signals during training.

    Raises:
        UserError: before any work, as `zofo.run.train.train`.
    """
    from zofo.smoothness.page import write_page

    if options.points and options.lanczos_steps:
        import zofo.smoothness.hessian  # noqa: F401  fails now if a dependency is missing
    require_derivatives(config)
    console = console or plain_console(stderr=True)
    with run_folder(config, resume, name=f"{default_name(config)}-smoothness") as folder:
        config = config.model_copy(update={"output_dir": str(folder)})
        records = Records(folder / RECORDS_FILE)  # a new folder has none yet
        start = time.monotonic()

        def say(text: str) -> None:
            line = f"{time.monotonic() - start:6.0f} s  {text}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)

        def began(folder: Path) -> None:
            values = {**config.model_dump(), SECTION: options.model_dump()}
            write_text(folder / OPTIONS_FILE, yaml_text(values))
            if on_start is not None:
                on_start(folder)

        if not options.train:
            _measure_start(config, options, records, say, lambda: began(folder))
        elif resume is None or not is_finished(folder):
            train_in(
                folder,
                config,
                is_resumed=resume is not None,
                console=console,
                on_start=began,
                stop=stop,
                watchers=lambda trainer: _recorders(trainer, options, records, say, stop),
            )
        found = summarise(records.all(), config.model_dump(), options.model_dump())
        write_json(folder / FILE, finite(found))
        write_page(folder / FILE, folder / PAGE_FILE)
    return folder


def _recorders(
    trainer: Any,
    options: SmoothnessOptions,
    records: Records,
    say: Callable[[str], None],
    stop: StopOnSignal | None,
) -> list[TrainerCallback]:
    steps = trainer.args.max_steps

    @cache
    def objective() -> Objective:  # both recorders share it
        return objective_of_trainer(
            trainer, num_rows=options.rows, seed=options.seed, batch_size=options.row_batch
        )

    def on_point(point: dict[str, Any]) -> None:
        # A block without gradient has None in place of its constants.
        own = {b: r and r["norm"] for b, r in (point.get("gradient") or {}).items()}
        text = ", ".join(f"{b} {v:.3g}" for b, v in own.items() if v)
        say(f"step {point['step']}: ‖∇f‖ {point['grad_norm']['full']:.3g}; {text}")

    along_path = SmoothnessRecorder(
        trainer,
        every=path_steps(options, steps),
        gammas=options.gammas,
        along_gradient=options.along_gradient,
        split=options.split,
        objective=objective,
        records=records,
        on_point=on_point,
    )
    at_points = point_steps(options, steps)
    return [along_path, PointRecorder(trainer, objective, at_points, options, records, say, stop)]


def _measure_start(
    config: RunConfig,
    options: SmoothnessOptions,
    records: Records,
    say: Callable[[str], None],
    began: Callable[[], None],
) -> None:
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    prepared = prepare(config)
    apply_method(prepared.model, config.method)
    began()
    measure_point(
        objective_of_rows(prepared, config, options),
        blocks_of(prepared.model, options.split),
        options,
        records,
        0,
        eps=float(config.eps),
        seed=config.seed,
        distribution=config.distribution,
        say=say,
    )


def objective_of_rows(
    prepared: Prepared, config: RunConfig, options: SmoothnessOptions
) -> Objective:
    """The training loss of a prepared run on `options.rows` random training rows."""
    from zofo.environment import resolve_device
    from zofo.tasks.losses import objective_loss

    model = prepared.model.to(resolve_device(config.device))
    device = next(model.parameters()).device
    parts = choose_rows(prepared.rows["train"], options.rows, options.seed, options.row_batch)
    return Objective(
        model,
        lambda batch: objective_loss(model, batch, config.task.objective),
        [{k: v.to(device) for k, v in prepared.collator(rows).items()} for rows in parts],
        [len(rows) for rows in parts],
    )


def saved_options(
    folder: Path, overrides: Sequence[str] = ()
) -> tuple[RunConfig, SmoothnessOptions]:
    """The configuration and the options that a folder was started with, with overrides.

    Raises:
        UserError: if it is not a folder of `zofo smoothness`.
    """
    path = folder / OPTIONS_FILE
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; name a folder of zofo smoothness to continue")
    if not path.is_file():
        raise UserError(f"{folder} holds no {OPTIONS_FILE}, so there is nothing to continue")
    return load_smoothness(path, overrides)
