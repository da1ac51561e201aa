"""Expands a study into its runs; the study alone decides their order and names.

    cell    a model on a task, moved by a method through an adapter with an optimizer
    run     a cell at one pair of learning rates with one seed
    name    MODEL_TASK_METHOD_ADAPTER-OPTIMIZER_bRATE_aRATE_sSEED

What does not apply to a method is left out of the name, and is `none` in the cell.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from zofo.config.load import load_config
from zofo.config.schema import RunConfig
from zofo.errors import UserError
from zofo.study.spec import SECTIONS, TIED, Entry, Pattern, Rates, StudySpec, Where, label_of

NONE: Final = "none"


class Cell(NamedTuple):
    """One combination of the axes' labels; `none` if a method has no adapter or optimizer."""

    model: str
    task: str
    method: str
    adapter: str
    optimizer: str

    @property
    def name(self) -> str:
        """Readable and unique in the study."""
        parts = [self.model, self.task, self.method]
        rest = [x for x in (self.adapter, self.optimizer) if x != NONE]
        return "_".join([*parts, *(["-".join(rest)] if rest else [])])


class Pair(NamedTuple):
    """Learning rates of a run; None for a frozen block."""

    base_lr: float | None
    adapter_lr: float | None

    @property
    def name(self) -> str:
        """Such as b1e-6_a1e-3."""
        parts = (("b", self.base_lr), ("a", self.adapter_lr))
        return "_".join(mark + rate_text(rate) for mark, rate in parts if rate is not None)


@dataclass(frozen=True)
class Run:
    """One run of a study."""

    cell: Cell
    rates: Pair
    seed: int

    @property
    def id(self) -> str:
        """Its name: unique in the study, and its folder's."""
        return f"{self.cell.name}_{self.rates.name}_s{self.seed}"


@dataclass(frozen=True)
class Grid:
    """A study, spread out.

    Attributes:
        spec: the study.
        rates: cell -> the pairs to choose from, in order of size.
        dropped: why combinations are left out, and how many.
    """

    spec: StudySpec
    rates: dict[Cell, tuple[Pair, ...]]
    dropped: dict[str, int] = field(default_factory=dict)

    @cached_property
    def search(self) -> tuple[Run, ...]:
        """The runs that choose the rates."""
        return tuple(
            Run(cell, pair, seed)
            for cell, pairs in self.rates.items()
            for pair in pairs
            for seed in self.spec.choosing_seeds
        )

    @property
    def other_seeds(self) -> tuple[int, ...]:
        """Seeds that are run at the chosen rates only."""
        return tuple(s for s in self.spec.seeds if s not in self.spec.choosing_seeds)

    @property
    def num_runs(self) -> int:
        """Searches and the runs of the other seeds."""
        return len(self.search) + len(self.rates) * len(self.other_seeds)

    @property
    def starts(self) -> tuple[tuple[str, str, int], ...]:
        """Model, task and seed of the untrained models that are measured beside."""
        found = {(cell.model, cell.task): None for cell in self.rates}
        return tuple((*pair, seed) for pair in found for seed in self.spec.seeds)

    def config(self, run: Run, output_dir: str | Path | None = None) -> RunConfig:
        """The configuration of a run.

        Raises:
            UserError: with every problem found.
        """
        return config_of(self.spec, run.cell, run.rates, run.seed, output_dir)


def rate_text(rate: float) -> str:
    """A rate with all its digits, such as 1e-6, 2.5e-4 or 0."""
    _, digits, exponent = Decimal(repr(float(rate))).normalize().as_tuple()
    assert isinstance(exponent, int)
    if not any(digits):
        return "0"
    head = str(digits[0]) + ("." + "".join(map(str, digits[1:])) if digits[1:] else "")
    power = exponent + len(digits) - 1
    return f"{head}e{power}"


def expand(spec: StudySpec) -> Grid:
    """Spread a study out.

    Raises:
        UserError: for every configuration problem, each once; if no cell is left.
    """
    dropped: dict[str, int] = {}
    cells: dict[Cell, tuple[Pair, ...]] = {}
    used = [False] * len(spec.exclude)
    problems: list[str] = []
    for cell in _cells(spec):
        reason = _unsuited(spec, cell)
        for i, where in enumerate(spec.exclude):
            if matches(where, cell):
                used[i], reason = True, "excluded"
        if reason is not None:
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        pairs, lacking = _pairs(spec, cell)
        problems += lacking
        cells[cell] = pairs
    for where, is_used in zip(spec.exclude, used, strict=True):
        if not is_used:
            given = {key: value for key, value in where.model_dump().items() if value != "*"}
            problems.append(f"exclude {given} matches no cell; correct or remove it")
    for cell, pairs in cells.items():
        if pairs:
            problems += _problems_of(spec, cell, pairs[0])
    if not cells and not problems:
        problems.append("no cell is left; exclude fewer")
    if problems:
        listed = list(dict.fromkeys(problems))
        raise UserError(f"study {spec.name}:\n" + "\n".join(f"  - {p}" for p in listed))
    return Grid(spec, cells, dropped)


def config_of(
    spec: StudySpec,
    cell: Cell,
    rates: Pair,
    seed: int,
    output_dir: str | Path | None = None,
) -> RunConfig:
    """The configuration of one run.

    Raises:
        UserError: with every problem found.
    """
    from zofo.optim.methods import METHODS

    method = "hybrid" if cell.method == TIED else cell.method
    values: dict[str, Any] = {
        **spec.base,
        "method": method,
        "model": _section(spec, "model", cell.model),
        "task": _section(spec, "task", cell.task),
        "seed": seed,
        "early_stopping": spec.early_stopping,
        "measure_test": False,
        "num_threads": spec.num_threads,
        "output_dir": None if output_dir is None else str(output_dir),
        "steps": spec.steps or 1,
    }
    values.pop("adapter", None)
    if METHODS[method].needs_adapter:
        values["adapter"] = _section(spec, "adapter", cell.adapter)
    if cell.optimizer != NONE:
        values["optimizer"] = cell.optimizer
    values |= {key: rate for key, rate in rates._asdict().items() if rate is not None}
    config = load_config(values=values)
    steps = spec.steps if spec.budget is None else steps_within(config, spec.budget)
    assert steps is not None
    update: dict[str, Any] = {"steps": steps}
    if "eval_every" not in spec.base:
        update["eval_every"] = max(1, steps // (spec.num_evaluations or 4))
    return config.model_copy(update=update)


def steps_within(config: RunConfig, budget: float) -> int:
    """The most steps that a number of forward-equivalents pays for.

    Raises:
        UserError: if it pays for none.
    """
    low, high = 0, int(budget) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost_of(config, middle) <= budget else (low, middle)
    if low == 0:
        raise UserError(
            f"budget is {budget:g} forward-equivalents, and one step of {config.method} costs "
            f"{cost_of(config, 1):g}; raise it"
        )
    return low


def cost_of(config: RunConfig, steps: int | None = None) -> float:
    """Forward-equivalents of a run's training."""
    from zofo.run.cost import forward_equivalents

    again = config.model.dtype != "float32"
    return forward_equivalents(config, steps or config.steps or 0, part_again=again)


def matches(where: Where, cell: Cell) -> bool:
    """Whether a cell's labels fit."""
    return all(_fits(getattr(where, f"{axis}s"), label) for axis, label in cell._asdict().items())


def _fits(pattern: Pattern, label: str) -> bool:
    patterns: Sequence[str] = [pattern] if isinstance(pattern, str) else pattern
    return any(fnmatch.fnmatchcase(label, p) for p in patterns)


def _cells(spec: StudySpec) -> Iterator[Cell]:
    """Every combination that differs, in the order of the axes."""
    from zofo.optim.methods import METHODS

    for model in spec.models:
        for task in spec.tasks:
            for method in spec.methods:
                orders = METHODS["hybrid" if method == TIED else method]
                adapters = [label_of(a, "type") for a in spec.adapters]
                has_gradient = orders.first is not None
                for adapter in adapters if orders.needs_adapter else [NONE]:
                    for optimizer in spec.optimizers if has_gradient else [NONE]:
                        labels = label_of(model, "name"), label_of(task, "name")
                        yield Cell(*labels, method, adapter, optimizer)


def _pairs(spec: StudySpec, cell: Cell) -> tuple[tuple[Pair, ...], list[str]]:
    """The rates to choose from, and what is missing."""
    from zofo.optim.methods import METHODS

    fitting = [rates for rates in spec.rates if matches(rates, cell)]
    orders = METHODS["hybrid" if cell.method == TIED else cell.method]
    base, adapter = _last(fitting, "base_lr"), _last(fitting, "adapter_lr")
    if cell.method == TIED:
        tied = _last(fitting, "tied") or sorted({*(base or ()), *(adapter or ())})
        lacking = [] if tied else [f"rates give no tied for {cell.name}; add them"]
        return tuple(Pair(rate, rate) for rate in sorted(tied)), lacking
    moved = {"base_lr": orders.base != "frozen", "adapter_lr": orders.adapter != "frozen"}
    grids = {"base_lr": base, "adapter_lr": adapter}
    lacking = [
        f"rates give no {key} for {cell.name}; add them"
        for key, is_moved in moved.items()
        if is_moved and not grids[key]
    ]
    pairs = [
        Pair(b, a)
        for b in (sorted(base or ()) if moved["base_lr"] else [None])
        for a in (sorted(adapter or ()) if moved["adapter_lr"] else [None])
    ]
    return tuple(pairs), lacking


def _last(fitting: Sequence[Rates], key: str) -> list[float] | None:
    given = [getattr(rates, key) for rates in fitting if getattr(rates, key) is not None]
    return given[-1] if given else None


def _section(spec: StudySpec, section: str, label: str) -> dict[str, Any]:
    """An entry of an axis with what all entries share."""
    key = SECTIONS[section]
    entries: list[Entry] = getattr(spec, f"{section}s")
    entry = next(e for e in entries if label_of(e, key) == label)
    own = {key: entry} if isinstance(entry, str) else dict(entry)
    own.pop("label", None)
    return {**spec.base.get(section, {}), **own}


def _problems_of(spec: StudySpec, cell: Cell, pair: Pair) -> list[str]:
    """What `zofo train` would refuse."""
    try:
        config_of(spec, cell, pair, spec.seeds[0])
    except UserError as error:
        lines = str(error).splitlines()
        if len(lines) == 1:
            return [lines[0].removeprefix("the configuration: ")]
        return [line.removeprefix("  - ") for line in lines[1:]]
    return []


def _unsuited(spec: StudySpec, cell: Cell) -> str | None:
    """Why a cell makes no sense, as far as can be told without the model."""
    task, model = _section(spec, "task", cell.task), _section(spec, "model", cell.model)
    if not _has_classes(str(task["name"])) and _is_classifier(model):
        return f"{cell.model} is an encoder, and {cell.task} has no fixed classes"
    return None


def _has_classes(task: str) -> bool:
    from zofo.tasks.families.table import BUILTIN

    if task not in BUILTIN:
        return task not in ("completion", "chat")
    return BUILTIN[task].kind == "classification"


def _is_classifier(model: dict[str, Any]) -> bool:
    """Of models that are here; a hub id is looked up when its runs begin."""
    from zofo.models.embedded import ALIASES
    from zofo.models.loading import head_of

    if model.get("head", "auto") != "auto":
        return model["head"] == "classification"
    name = str(model["name"])
    if name in ALIASES:
        return name == "minilm"
    is_here = (Path(name).expanduser() / "config.json").is_file()
    return is_here and not model.get("trust_remote_code") and head_of(name) == "classification"


def as_json(run: Run) -> dict[str, Any]:
    """What tells a run apart, as plain values."""
    return {
        "id": run.id,
        "cell": run.cell._asdict(),
        "rates": run.rates._asdict(),
        "seed": run.seed,
    }
