"""Expands a study into its runs, whose order and names depend on nothing but the study.

    cell    a combination of model, task, method, adapter and optimizer
    run     a cell with one pair of learning rates and one seed
    name    MODEL_TASK_METHOD_ADAPTER-OPTIMIZER_bRATE_aRATE_sSEED

If a method has no adapter or no optimizer, the name omits it and the cell holds `none`.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from zofo.config.load import read_config
from zofo.config.schema import RunConfig
from zofo.errors import UserError, shown
from zofo.optim.methods import METHODS, Method
from zofo.study.entries import SECTIONS, Entry, label_of
from zofo.study.spec import TIED, Pattern, Rates, StudySpec, Where

NONE: Final = "none"
_MAX_NAME_BYTES: Final = 240  # File systems allow 255, with a suffix.


class Cell(NamedTuple):
    """One combination of the labels of all axes."""

    model: str
    task: str
    method: str
    adapter: str
    optimizer: str

    @property
    def name(self) -> str:
        """Readable name, unique in the study."""
        parts = [self.model, self.task, self.method]
        rest = [x for x in (self.adapter, self.optimizer) if x != NONE]
        return "_".join([*parts, *(["-".join(rest)] if rest else [])])


class RateMap(dict[str, float]):
    """A map from patterns of weight names to rates that can be a part of a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


class Pair(NamedTuple):
    """The learning rates of a run; None for a frozen block."""

    base_lr: float | RateMap | None
    adapter_lr: float | None

    @property
    def name(self) -> str:
        """Both rates in words, such as b1e-6_a1e-3, or b-proj-6e-4_a1e-3 for a map."""
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
        """Name of the run and of its folder, unique in the study."""
        return f"{self.cell.name}_{self.rates.name}_s{self.seed}"


@dataclass(frozen=True)
class Grid:
    """All cells and runs of a study.

    Attributes:
        spec: the study.
        rates: cell -> the pairs of learning rates to choose from, in ascending order.
        dropped: reason -> number of combinations that are left out.
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
        """The seeds that run only at the chosen rates."""
        return tuple(s for s in self.spec.seeds if s not in self.spec.choosing_seeds)

    @property
    def num_runs(self) -> int:
        """Number of runs that choose rates, and of runs with the other seeds."""
        return len(self.search) + len(self.rates) * len(self.other_seeds)

    @property
    def starts(self) -> tuple[tuple[str, str, int], ...]:
        """Model, task and seed of each untrained model that is measured for comparison."""
        found = {(cell.model, cell.task): None for cell in self.rates}
        return tuple((*pair, seed) for pair in found for seed in self.spec.seeds)

    def config(self, run: Run, output_dir: str | Path | None = None) -> RunConfig:
        """The configuration of a run; see `config_of`."""
        return config_of(self.spec, run.cell, run.rates, run.seed, output_dir)


def rate_text(rate: float | RateMap) -> str:
    """A rate with all its digits, such as 1e-6, 2.5e-4 or 0; for a map, also its patterns."""
    if isinstance(rate, RateMap):
        words = ("".join(c if c.isalnum() else "-" for c in pattern) for pattern in rate)
        return "".join(
            f"-{'-'.join(filter(None, word.split('-')))}-{rate_text(value)}"
            for word, value in zip(words, rate.values(), strict=True)
        )
    # Decimal of repr keeps the shortest digits that restore the float, so different rates never
    # share a name.
    _, digits, exponent = Decimal(repr(float(rate))).normalize().as_tuple()
    assert isinstance(exponent, int)
    if not any(digits):
        return "0"
    head = str(digits[0]) + ("." + "".join(map(str, digits[1:])) if digits[1:] else "")
    power = exponent + len(digits) - 1
    return f"{head}e{power}"


def expand(spec: StudySpec) -> Grid:
    """Find all cells of a study and the pairs of learning rates of each.

    Raises:
        UserError: with every problem of a configuration, or if no cell is left.
    """
    dropped: dict[str, int] = {}
    cells: dict[Cell, tuple[Pair, ...]] = {}
    used = [False] * len(spec.exclude)
    problems: list[str] = []
    for cell in _cells(spec):
        reason = _unsuited(spec, cell)
        # Look at every pattern, because a pattern that matches no cell at all is reported below.
        for i, where in enumerate(spec.exclude):
            if matches(where, cell):
                used[i], reason = True, "excluded"
        if reason is not None:
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        cells[cell], lacking = _pairs(spec, cell)
        problems += lacking
        ids = [Run(cell, pair, 2**32 - 1).id for pair in cells[cell]]
        if len(set(ids)) < len(ids):
            problems.append(
                f"two maps of base_lr for {shown(cell.name)} differ only in characters that the "
                "name of a folder cannot have; write the patterns so that their letters differ"
            )
        if any(len(name.encode()) > _MAX_NAME_BYTES for name in ids):
            problems.append(
                f"the runs of {shown(cell.name)} have names of more than {_MAX_NAME_BYTES} bytes, "
                "too long for a folder; give its model, task or adapter a short label"
            )
    for where, is_used in zip(spec.exclude, used, strict=True):
        if not is_used:
            given = {key: value for key, value in where.model_dump().items() if value != "*"}
            problems.append(f"exclude {given} matches no cell; correct or remove it")
    # All pairs of a cell are configured alike, so the first one shows every problem.
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
    values: dict[str, Any] = {
        **spec.base,
        "method": "hybrid" if cell.method == TIED else cell.method,
        "model": _section(spec, "model", cell.model),
        "task": _section(spec, "task", cell.task),
        "seed": seed,
        "early_stopping": spec.early_stopping,
        "measure_test": False,  # `zofo.study.measure` does so once all rates are chosen
        "num_threads": spec.num_threads,
        "output_dir": None if output_dir is None else str(output_dir),
        "steps": spec.steps or 1,  # with a budget, the number of steps follows from the cost below
    }
    values.pop("adapter", None)
    if method_of(cell.method).needs_adapter:
        values["adapter"] = _section(spec, "adapter", cell.adapter)
    if cell.optimizer != NONE:
        values["optimizer"] = cell.optimizer
    values |= {key: rate for key, rate in rates._asdict().items() if rate is not None}
    config = read_config(values=values)
    steps = spec.steps if spec.budget is None else steps_within(config, spec.budget)
    assert steps is not None
    update: dict[str, Any] = {"steps": steps}
    if "eval_every" not in spec.base:
        update["eval_every"] = max(1, steps // (spec.num_evaluations or 4))
    return config.model_copy(update=update)


def steps_within(config: RunConfig, budget: float) -> int:
    """The largest number of steps whose cost is within a budget of forward-equivalents.

    Raises:
        UserError: if the budget is smaller than the cost of one step.
    """
    # Bisect: the cost grows with the steps, and each step costs at least one forward-equivalent.
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

    # `zofo.run.plan` also counts dropout, which is unknown before the model is loaded.
    again = config.model.dtype != "float32"
    return forward_equivalents(config, steps or config.steps or 0, part_again=again)


def matches(where: Where, cell: Cell) -> bool:
    """Whether every label of a cell matches its pattern, or one of its patterns."""

    def fits(pattern: Pattern, label: str) -> bool:
        patterns = [pattern] if isinstance(pattern, str) else pattern
        return any(fnmatch.fnmatchcase(label, p) for p in patterns)

    return all(fits(getattr(where, f"{axis}s"), label) for axis, label in cell._asdict().items())


def method_of(label: str) -> Method:
    """The method behind the label of a cell."""
    return METHODS["hybrid" if label == TIED else label]


def _cells(spec: StudySpec) -> Iterator[Cell]:
    """Every different combination, in the order of the axes."""
    for model in spec.models:
        for task in spec.tasks:
            for method, optimizers in _methods(spec).items():
                orders = method_of(method)
                adapters = [label_of(a, "type") for a in spec.adapters]
                for adapter in adapters if orders.needs_adapter else [NONE]:
                    for optimizer in optimizers if orders.first is not None else [NONE]:
                        labels = label_of(model, "name"), label_of(task, "name")
                        yield Cell(*labels, method, adapter, optimizer)


def _methods(spec: StudySpec) -> dict[str, list[str]]:
    """Method -> its optimizers, in the order of the runs; both methods of a gate come first."""
    found: dict[str, list[str]] = {method: list(spec.optimizers) for method in spec.methods}
    if spec.gate:
        full = dict.fromkeys(["adamw", *found.pop("fo-ft", [])])
        found = {"fo-ft": list(full), "fo-peft": found.pop("fo-peft"), **found}
    return found


def _pairs(spec: StudySpec, cell: Cell) -> tuple[tuple[Pair, ...], list[str]]:
    """The pairs of rates to choose from, and problems with missing rates."""
    fitting = [rates for rates in spec.rates if matches(rates, cell)]
    orders = method_of(cell.method)
    base, adapter = _last(fitting, "base_lr"), _last(fitting, "adapter_lr")
    if cell.method == TIED:
        single = [rate for rate in (*(base or ()), *(adapter or ())) if not isinstance(rate, dict)]
        tied = _last(fitting, "tied") or sorted(set(single))
        lacking = [] if tied else [f"rates give no tied for {cell.name}; add them"]
        return tuple(Pair(rate, rate) for rate in sorted(tied)), lacking
    # A frozen block has the single rate None, so that the product below has a pair.
    grids: dict[str, Sequence[Any]] = {
        "base_lr": [None] if orders.base == "frozen" else _ascending(base or ()),
        "adapter_lr": [None] if orders.adapter == "frozen" else sorted(adapter or ()),
    }
    missing = [key for key, rates in grids.items() if not rates]
    lacking = [f"rates give no {key} for {cell.name}; add them" for key in missing]
    return tuple(Pair(*rates) for rates in itertools.product(*grids.values())), lacking


def _ascending(rates: Sequence[float | dict[str, float]]) -> list[float | RateMap]:
    """The rates in ascending order, then the maps by their largest rate."""
    maps = [RateMap(rate) for rate in rates if isinstance(rate, dict)]
    single = sorted(rate for rate in rates if not isinstance(rate, dict))
    return [*single, *sorted(maps, key=lambda rate: max(rate.values()))]


def _last(fitting: Sequence[Rates], key: str) -> list[Any] | None:
    # Later entries of `rates` override earlier ones, but only in the keys that they give.
    given = [getattr(rates, key) for rates in fitting if getattr(rates, key) is not None]
    return given[-1] if given else None


def _section(spec: StudySpec, section: str, label: str) -> dict[str, Any]:
    """The options of an entry of an axis, including those that all its entries share."""
    key = SECTIONS[section]
    entries: list[Entry] = getattr(spec, f"{section}s")
    entry = next(e for e in entries if label_of(e, key) == label)
    own = {key: entry} if isinstance(entry, str) else dict(entry)
    own.pop("label", None)
    return {**spec.base.get(section, {}), **own}


def _problems_of(spec: StudySpec, cell: Cell, pair: Pair) -> list[str]:
    """The problems for which `zofo train` would refuse a configuration."""
    try:
        config_of(spec, cell, pair, spec.seeds[0])
    except UserError as error:
        # Strip heading and bullets: `expand` lists these problems under its own heading.
        lines = str(error).splitlines()
        if len(lines) == 1:
            return [lines[0].removeprefix("the configuration: ")]
        return [line.removeprefix("  - ") for line in lines[1:]]
    return []


def _unsuited(spec: StudySpec, cell: Cell) -> str | None:
    """Why the model of a cell cannot do its task; None if that is unknown before it is loaded."""
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
    """Whether a local model has a classification head; a hub id is not looked up here."""
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
    """The values that identify a run, for JSON."""
    cell, rates = run.cell._asdict(), run.rates._asdict()
    return {"id": run.id, "cell": cell, "rates": rates, "seed": run.seed}
