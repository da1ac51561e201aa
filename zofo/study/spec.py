"""Defines a study: axes, grids of learning rates, and an equal budget for all methods.

    cells = models x tasks x methods x adapters x optimizers
    runs  = cells x rates x seeds

A method that does not update an adapter has no adapter axis, and a method without a gradient has no
optimizer axis. `hybrid-tied` is hybrid with one learning rate for both blocks. A gate adds fo-ft.
If an axis is omitted, it takes its value from `base`. A section of `base` holds the options that
all entries of its axis share.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import unquote

from pydantic import BaseModel, Field, ValidationError, field_validator

from zofo.config.checks import PATHS
from zofo.config.load import (
    SHORTHANDS,
    apply_override,
    describe_problem,
    join_problems,
    most_precise,
)
from zofo.config.schema import AUTO, AdapterConfig, ModelConfig, RunConfig
from zofo.disk.yaml import read_yaml, yaml_text
from zofo.errors import UserError
from zofo.optim.methods import METHODS, MethodName
from zofo.rewards.functions import with_absolute_paths
from zofo.sections import MAX_THREADS, Section
from zofo.study.entries import SECTIONS, Entry, expand_each, label_of
from zofo.tasks.spec import TaskSpec

SPEC_FILE: Final = "study.yaml"
TIED: Final = "hybrid-tied"
_SECTION_TYPES: Final[dict[str, type[BaseModel]]] = {
    "models": ModelConfig,
    "tasks": TaskSpec,
    "adapters": AdapterConfig,
}
_OWN_KEYS: Final = ("output_dir", "measure_test", "epochs")
"""Keys of a run that are dropped from `base`, because only the study sets them."""
_AXES: Final = {
    "models": "model",
    "tasks": "task",
    "adapters": "adapter",
    "methods": "method",
    "optimizers": "optimizer",
    "seeds": "seed",
    "steps": "steps",
    "num_threads": "num_threads",
    "early_stopping": "early_stopping",
}
"""Keys of a study -> keys of `base` that give their value if they are omitted."""
_SCALARS: Final = ("steps", "num_threads", "early_stopping")
_STORAGE_OPTIONS: Final = (
    *("host", "port", "user", "dbname", "unix_socket", "options", "application_name"),
    *("connect_timeout", "target_session_attrs", "sslmode", "sslrootcert", "sslcert", "sslkey"),
    *("charset", "timeout", "mode", "cache", "uri"),
)
"""Options of a database's URL that hold no password."""
_NO_AUTO: Final = (
    "cannot be auto: a study compares runs with equal values, and auto chooses other values for "
    "each seed; list the rates, or compare with auto by benchmarks/advisor.py"
)
StudyMethod = Literal[MethodName, "hybrid-tied"]
Pattern = str | list[str]


class Where(Section):
    """Selects cells by patterns for their labels; an omitted key matches every label."""

    models: Pattern = "*"
    tasks: Pattern = "*"
    methods: Pattern = "*"
    adapters: Pattern = "*"
    optimizers: Pattern = "*"


RateMap = dict[str, float]


class Rates(Where):
    """Grids of learning rates for the cells that match."""

    base_lr: list[float | RateMap] | None = Field(
        None,
        min_length=1,
        description="of the base; also maps from patterns of weight names to rates",
    )
    adapter_lr: list[float] | None = Field(None, min_length=1, description="of the adapter")
    tied: list[float] | None = Field(
        None, min_length=1, description="of hybrid-tied; default: the rates of both blocks together"
    )

    @field_validator("base_lr", "adapter_lr", "tied", mode="before")
    @classmethod
    def _are_grids(cls, value: Any) -> Any:
        if isinstance(value, str | int | float | dict) and not isinstance(value, bool):
            value = [value]  # a single rate needs no brackets in YAML
        if isinstance(value, list) and AUTO in value:
            raise ValueError(_NO_AUTO)
        return value

    @field_validator("base_lr", "adapter_lr", "tied")
    @classmethod
    def _are_rates(cls, value: list[float | RateMap] | None) -> list[float | RateMap] | None:
        for given in value or ():
            if given == {}:
                raise ValueError("must not hold an empty map; name the weights that move")
            rates = given.values() if isinstance(given, dict) else [given]
            if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
                raise ValueError("must be finite numbers of at least 0")
        # Maps with their patterns in another order are other maps: the first match counts.
        if value is not None and len(set(map(str, value))) < len(value):
            raise ValueError("must not hold a rate twice")
        return value


class StudySpec(Section):
    """A study."""

    name: str = Field("study", pattern=r"^[\w.-]+$", description="name of the study")
    output: str = Field(description="study folder")
    base: dict[str, Any] = Field({}, description="options that all runs share, or a file of them")
    models: list[Entry] = Field(min_length=1, description="names, or sections with a label")
    tasks: list[Entry] = Field(min_length=1, description="names, or sections with a label")
    methods: list[StudyMethod] = Field(
        min_length=1, description="methods; also hybrid-tied, which has one rate for both blocks"
    )
    gate: bool = Field(
        False, description="also run fo-ft with adamw, first: is there room for the base at all?"
    )
    adapters: list[Entry] = Field(min_length=1, description="types, or sections with a label")
    optimizers: list[Literal["adamw", "sgd"]] = Field(
        min_length=1, description="optimizers of the first-order block"
    )
    seeds: list[int] = Field(min_length=1, description="seeds of the runs at the chosen rates")
    select_seeds: list[int] | None = Field(
        None, min_length=1, description="seeds that choose the rates; default: the first seed"
    )
    select_by: Literal["loss", "accuracy"] = Field(
        "loss", description="mean dev score that chooses the rates"
    )
    rates: list[Rates] = Field(
        min_length=1, description="grids; the last grid that matches a cell and gives a key counts"
    )
    budget: float | None = Field(
        None, gt=0, description="forward-equivalents of each run, equal for all methods"
    )
    steps: int | None = Field(None, ge=1, description="steps of each run, instead of budget")
    num_evaluations: int | None = Field(
        None, ge=1, description="evaluations on dev per run; default: by base.eval_every, else 4"
    )
    early_stopping: float | None = Field(
        1.0, ge=0, description="early_stopping of every run; null: never stop early"
    )
    num_threads: int = Field(1, ge=1, le=MAX_THREADS, description="CPU threads of each run")
    keep: Literal["chosen", "all"] = Field(
        "chosen",
        description="files that stay; chosen: only the artefacts of runs at the chosen rates",
    )
    storage: str | None = Field(
        None, description="URL of the queue's database; default: study.db in the study folder"
    )
    exclude: list[Where] = Field([], description="cells to leave out")

    @field_validator("methods", "optimizers", "seeds", "select_seeds")
    @classmethod
    def _are_different(cls, value: list[Any] | None) -> list[Any] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("must not hold a value twice")
        return value

    @field_validator("seeds", "select_seeds")
    @classmethod
    def _are_seeds(cls, value: list[int] | None) -> list[int] | None:
        if any(not 0 <= seed < 2**32 for seed in value or ()):
            raise ValueError("must be from 0 to 2^32 - 1")
        return value

    @property
    def choosing_seeds(self) -> tuple[int, ...]:
        """The seeds whose runs choose the rates."""
        return tuple(self.select_seeds or self.seeds[:1])

    def to_yaml(self) -> str:
        """The study as YAML, from which `load_spec` restores it."""
        values = self.model_dump()
        for part in (*values["rates"], *values["exclude"]):
            for key in [k for k, v in part.items() if v is None or v == "*"]:
                del part[key]
        return yaml_text(values)


def presets() -> dict[str, Path]:
    """Name -> file of each study that is part of the package."""
    folder = Path(str(resources.files("zofo.study"))) / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_spec(name: str | Path) -> Path:
    """The file of a study, given by its path, the name of a preset, or a study folder.

    Raises:
        UserError: if it does not exist.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / SPEC_FILE).is_file():
            raise UserError(f"{path} holds no {SPEC_FILE}, so it is no study folder")
        return path / SPEC_FILE
    if path.is_file():
        return path
    known = presets()
    if str(name) in known:
        return known[str(name)]
    near = _nearest(str(name), known)
    hint = f"did you mean {near}? " if near else ""
    raise UserError(
        f"the study {name} does not exist; {hint}give a YAML file, a study folder, or one of "
        f"{', '.join(known)}"
    )


def _nearest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Read a study, complete it and check it.

    Args:
        path: YAML file, name of a preset, or study folder.
        overrides: "key=value", as for `zofo train`.

    Raises:
        UserError: with every problem found.
    """
    file = find_spec(path)
    given = read_yaml(file)
    problems: list[str] = []
    for override in overrides:
        problems += apply_override(given, override)
    if isinstance(given.get("base"), str):
        # A relative path starts at the working directory, or else beside the file of the study.
        base = Path(given["base"]).expanduser()
        given["base"] = read_yaml(base if base.exists() else file.parent / base)
    problems += _take_from_base(given)
    problems += expand_each(given)
    # A single entry may be given without a list.
    if isinstance(given.get("rates"), dict):
        given["rates"] = [given["rates"]]
    if Path(path).expanduser().is_dir():
        given["output"] = str(path)  # the folder may have been moved, or mounted elsewhere
    if "output" not in given:
        given["output"] = str(Path("studies") / str(given.get("name", file.stem)))
    given.setdefault("name", file.stem)
    try:
        spec = StudySpec.model_validate(given)
    except ValidationError as error:
        problems += list(dict.fromkeys(_described(e) for e in most_precise(error.errors())))
        raise UserError(join_problems(str(file), problems)) from None
    problems += _check(spec)
    if problems:
        raise UserError(join_problems(str(file), problems))
    return _with_absolute_paths(spec)


def differences(saved: StudySpec, spec: StudySpec) -> list[str]:
    """Changes that forbid continuing a study; more seeds and another database are allowed."""
    # `select_seeds` may be omitted, so compare the seeds that it stands for.
    then, now = saved.model_dump(), spec.model_dump()
    then["select_seeds"], now["select_seeds"] = saved.choosing_seeds, spec.choosing_seeds
    found = []
    for key in then:
        if key in ("storage", "output") or then[key] == now[key]:
            continue
        if key == "seeds" and now[key][: len(then[key])] == then[key]:
            continue
        found.append(f"{key}: {then[key]} -> {now[key]}")
    return found


def _take_from_base(given: dict[str, Any]) -> list[str]:
    """Move values of `base` to the omitted axes, and return problems."""
    base = given.get("base") or {}
    if not isinstance(base, dict):
        return []
    # Drop a null that is the default of its key, because it sets nothing.
    known = RunConfig.model_fields
    unset = [k for k, v in base.items() if v is None and k in known and known[k].default is None]
    base = {k: v for k, v in base.items() if k not in unset}
    problems = []
    if "epochs" in base:  # an epoch costs the methods different numbers of forward passes
        problems.append("base.epochs is not equal for all methods; give budget or steps")
    for key in _OWN_KEYS:
        base.pop(key, None)
    for axis, key in _AXES.items():
        value = base.pop(key, None)
        if key in SECTIONS and isinstance(value, dict):
            rest = {k: v for k, v in value.items() if k != SECTIONS[key]}
            value = value.get(SECTIONS[key])
            if rest:
                base[key] = rest  # shared by all entries of the axis
        if value is not None and axis not in given and not (axis == "steps" and "budget" in given):
            given[axis] = value if axis in _SCALARS else [value]
    rates = {key: base.pop(key, None) for key in ("base_lr", "adapter_lr")}
    if "rates" not in given and any(rate is not None for rate in rates.values()):
        given["rates"] = [{key: [rate] for key, rate in rates.items() if rate is not None}]
    defaults = {"methods": list(METHODS), "adapters": ["lora"], "optimizers": ["adamw"]}
    for axis, default in {**defaults, "seeds": [0]}.items():
        given.setdefault(axis, default)
    given["base"] = base
    return problems


def _described(error: Any) -> str:
    if error["type"] == "missing":
        return f"{error['loc'][0]} is missing; give it, or the run's key in base"
    if error["type"] == "extra_forbidden":
        path = error["loc"]
        home: type[BaseModel] = {"rates": Rates, "exclude": Where}.get(str(path[0]), StudySpec)
        near = _nearest(str(path[-1]), home.model_fields)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(home.model_fields)}"
        return f"unknown key {'.'.join(map(str, path))}; {hint}"
    return describe_problem(error)


def _check(spec: StudySpec) -> list[str]:
    """Problems that involve several fields."""
    problems = []
    if (spec.budget is None) == (spec.steps is None):
        problems.append("give budget (forward-equivalents a run) or steps: one of the two")
    if spec.gate and spec.budget is None:
        problems.append("gate is true and compares at equal cost; give budget in place of steps")
    if spec.gate and "fo-peft" not in spec.methods:
        problems.append("gate is true and compares fo-ft with fo-peft; add fo-peft to methods")
    if spec.num_evaluations is not None and "eval_every" in spec.base:
        problems.append("num_evaluations and base.eval_every are both given; keep one")
    if spec.base.get("eps") == AUTO:
        problems.append(f"base.eps {_NO_AUTO}")
    if spec.select_by == "accuracy" and spec.base.get("select_by", "loss") != "accuracy":
        problems.append("select_by is accuracy: set base.select_by to the same")
    more = sorted(set(spec.choosing_seeds) - set(spec.seeds))
    if more:
        problems.append(f"select_seeds {more} are not among the seeds; add them there")
    for key in _SECTION_TYPES:
        problems += _check_entries(spec, key)
    problems += _check_storage(spec.storage)
    return problems


def _check_storage(url: str | None) -> list[str]:
    """A message if a URL is none, or could hold a password in any spelling."""
    if url is None:
        return []
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parts = make_url(url)
    except (ArgumentError, ValueError):  # The message must not repeat a password.
        return ["storage is no URL of a database, such as postgresql://me@db.example.org/zofo"]
    remedy = "which would be written into the study folder; leave it out and set PGPASSWORD, or "
    remedy += "write ~/.pgpass"
    login = unquote(unquote(re.split("[/?]", url.partition("://")[2])[0])).rpartition("@")[0]
    if parts.password is not None or ":" in login:
        return [f"storage holds a password, {remedy}"]
    if set(parts.query) <= set(_STORAGE_OPTIONS):
        return []
    return [
        f"storage has options other than {', '.join(_STORAGE_OPTIONS)}: they may hold a password, "
        f"{remedy}"
    ]


def _check_entries(spec: StudySpec, axis: str) -> list[str]:
    section, key = _SECTION_TYPES[axis], SECTIONS[axis[:-1]]
    problems = []
    for entry in getattr(spec, axis):
        values = {key: entry} if isinstance(entry, str) else entry
        shared = spec.base.get(axis[:-1], {})
        for name in [*values, *shared]:
            if name not in section.model_fields and name != "label":
                near = _nearest(str(name), section.model_fields)
                hint = f"; did you mean {near}?" if near else ""
                problems.append(f"unknown key {name} in {axis}{hint}")
        if key not in values:
            problems.append(f"{axis} holds {entry}, which lacks {key}")
    labels = [label_of(entry, key) for entry in getattr(spec, axis)]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        problems.append(f"{axis} holds {label} twice; give one of them a label of its own")
    return list(dict.fromkeys(problems))


def _with_absolute_paths(spec: StudySpec) -> StudySpec:
    """Make paths absolute, because workers may run in other working directories."""
    update: dict[str, Any] = {"output": str(Path(spec.output).expanduser().absolute())}
    for section in SECTIONS:
        entries = getattr(spec, f"{section}s")
        update[f"{section}s"] = [_absolute(entry, section) for entry in entries]
    shared = {key: _absolute(spec.base[key], key) for key in PATHS if spec.base.get(key)}
    return spec.model_copy(update={**update, "base": {**spec.base, **shared}})


def _absolute(entry: Any, section: str) -> Any:
    from zofo.models.embedded import ALIASES

    key = SHORTHANDS[section]
    values = dict(entry) if isinstance(entry, Mapping) else {key: entry}
    for name in PATHS[section]:
        value = values.get(name)
        if not isinstance(value, str) or value in ALIASES:
            continue
        path = Path(value).expanduser()
        # Data options may name a hub dataset or its split, and a folder may have the same name.
        if path.is_dir() if name in ("name", "data_dir") else path.is_file():
            values[name] = str(path.absolute())
    if section == "reward" and values.get(key):
        values[key] = with_absolute_paths(values[key])
    return values if isinstance(entry, Mapping) else values[key]
