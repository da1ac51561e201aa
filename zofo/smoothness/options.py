"""The options of `zofo smoothness`, and what its measurements cost.

The configuration of a run has one more section:

    smoothness: {rows: 16, every: 2, points: 2, split: layer}

The unit of cost is a forward pass over the measured rows without gradients. A gradient costs 3, and
a Hessian-vector product costs 6 (`zofo.smoothness.objective`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from zofo.config.load import apply_override, join_problems, load_config
from zofo.config.schema import RunConfig
from zofo.disk.yaml import read_yaml
from zofo.errors import UserError, problem_in_words, shown
from zofo.sections import Section

SECTION: Final = "smoothness"
_GRADIENT, _PRODUCT = 3, 6
_CHECKED: Final = 2
"""Number of directions that are measured at eps / 2 too."""
_SAMPLES: Final = 4
"""Vectors that the test of the majoriser samples: the gradient and three random ones."""
_MEASUREMENTS_OF_A_PATH: Final = 30
"""Our choice, if `every` is not given: fits with intervals need 8 or more."""


class SmoothnessOptions(Section):
    """The section `smoothness` of the configuration."""

    model_config = ConfigDict(strict=True)

    train: bool = Field(True, description="measure along a training run; false: at the start only")
    rows: int = Field(16, ge=1, description="training rows in f, or all rows if there are fewer")
    row_batch: int | None = Field(
        None, ge=1, description="rows of a forward pass; default: all, which keeps the graph"
    )
    every: int | None = Field(
        None, ge=1, description="steps between measurements of the path; default: 30 in the run"
    )
    gammas: list[float] = Field(
        [1.0], description="points on a step, in (0, 1]; the largest constant counts"
    )
    along_gradient: bool = Field(True, description="measure each block along its own gradient too")
    split: Literal["none", "layer", "type"] = Field(
        "none", description="parts of the base to measure too"
    )
    points: int = Field(
        2, ge=0, description="steps at which spectra are measured, from the start to the end"
    )
    lanczos_steps: int = Field(
        16, ge=0, description="products for the ends of a spectrum; 0: no spectra, no majoriser"
    )
    probes: int = Field(8, ge=1, description="products for a trace")
    trace: Literal["hutchinson", "hutch++"] = Field(
        "hutchinson", description="the estimator of traces"
    )
    directions: int = Field(
        16, ge=0, description="directions for the curvature by forward passes; 0: none"
    )
    majoriser: bool = Field(True, description="test the diagonal majoriser at each point")
    memory_mib: int = Field(4096, ge=1, description="memory up to which Lanczos keeps its vectors")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of rows and probes")

    @field_validator("gammas")
    @classmethod
    def _check_gammas(cls, gammas: list[float]) -> list[float]:
        if not gammas or not all(0 < gamma <= 1 for gamma in gammas):
            raise PydanticCustomError("gammas", "needs at least one number, all in (0, 1]")
        return gammas

    @property
    def memory_bytes(self) -> int:
        """The memory for the vectors of Lanczos, in bytes."""
        return self.memory_mib << 20


def load_smoothness(
    path: str | Path | None = None, overrides: Sequence[str] = ()
) -> tuple[RunConfig, SmoothnessOptions]:
    """The configuration of the run and the section, from a file and "key=value" overrides.

    Args:
        path: YAML file; None: the defaults.
        overrides: overrides of both, such as "steps=60" and "smoothness.rows=32".

    Raises:
        UserError: with all problems.
    """
    where = "the configuration" if path is None else str(path)
    values = {} if path is None else read_yaml(Path(path))
    section = values.pop(SECTION, None) or {}
    own = [o for o in overrides if o.strip().startswith(f"{SECTION}.")]
    whole = [o for o in overrides if o.strip().startswith(f"{SECTION}=")]
    problems = [f"{o.strip()!r} sets a whole section; write {SECTION}.KEY=VALUE" for o in whole]
    if not isinstance(section, Mapping):
        problems.append(f"{SECTION} is {section!r}; it must be a mapping of keys to values")
        section = {}
    holder: dict[str, Any] = {SECTION: dict(section)}
    for override in own:
        problems += apply_override(holder, override)
    options = SmoothnessOptions()
    try:
        options = SmoothnessOptions.model_validate(holder[SECTION])
    except ValidationError as error:
        problems += [_in_words(e) for e in error.errors()]
    try:
        config = load_config(
            overrides=[o for o in overrides if o not in (*own, *whole)], values=values or None
        )
        if config.auto_keys:
            problems.append(
                f"{' and '.join(config.auto_keys)} {'is' if len(config.auto_keys) == 1 else 'are'} "
                "auto; use the numbers that zofo advise prints"
            )
        if config.model.dtype != "float32" and (options.train or options.lanczos_steps):
            problems.append(
                f"model.dtype is {config.model.dtype}, whose rounding exceeds the change of a "
                f"gradient in a step; set model.dtype=float32, or {SECTION}.train=false and "
                f"{SECTION}.lanczos_steps=0 for the curvature by forward passes alone"
            )
    except UserError as error:
        # `load_config` had no path, so it calls the file "the configuration".
        named = str(error).replace("the configuration", where, 1)
        if not problems:
            raise UserError(named) from None
        problems.append(named)
    if problems:
        raise UserError(join_problems(where, problems))
    return config, options


def path_steps(options: SmoothnessOptions, steps: int) -> int:
    """Number of steps from one measurement of the path to the next."""
    return options.every or max(1, steps // _MEASUREMENTS_OF_A_PATH)


def point_steps(options: SmoothnessOptions, steps: int) -> list[int]:
    """Numbers of optimizer steps after which spectra are measured, from the start to the end."""
    if options.points == 0:
        return []
    if options.points == 1 or not options.train:
        return [0]
    return sorted({round(i * steps / (options.points - 1)) for i in range(options.points)})


def planned_forwards(
    options: SmoothnessOptions, steps: int, *, num_moving: int, num_blocks: int, num_parts: int
) -> dict[str, float]:
    """Measurement -> its cost in forward passes over the measured rows.

    Args:
        options: what is measured.
        steps: optimizer steps of the run.
        num_moving: how many of base and adapter the method changes.
        num_blocks: how many of base and adapter exist.
        num_parts: number of parts of the base.
    """
    num_points = len(point_steps(options, steps))
    # `-(-a // b)` rounds up. The path is measured at steps 0, every, 2 · every, ...
    measured = -(-steps // path_steps(options, steps)) if options.train else 0
    # If both blocks move, `alone` needs one more gradient for each of them.
    alone = num_moving if num_moving > 1 else 0
    a_step = _GRADIENT * (1 + (1 + alone) * len(options.gammas))
    a_step += _PRODUCT * num_blocks if options.along_gradient else 0
    products = options.lanczos_steps + max(0, options.probes - 1)  # Lanczos serves as one probe
    if options.trace == "hutch++":
        products = options.lanczos_steps + 3 * max(1, options.probes // 3)
    a_spectrum = _GRADIENT + _PRODUCT * products if options.lanczos_steps else 0
    a_direction = 1 + 2 * (options.directions + _CHECKED) if options.directions else 0
    a_test = _GRADIENT + _PRODUCT * (options.lanczos_steps + _SAMPLES)
    every_block = num_blocks + num_parts
    tests = options.majoriser and options.lanczos_steps
    return {
        # The rounding of each block takes two gradients, once.
        "path": measured * a_step + (2 * _GRADIENT * num_blocks if measured else 0),
        "spectra": num_points * every_block * a_spectrum,
        "directions": num_points * every_block * a_direction,
        "majoriser": num_points * a_test if tests and num_blocks > 1 else 0,
    }


def _in_words(error: Any) -> str:
    key = ".".join((SECTION, *(str(part) for part in error["loc"])))
    if error["type"] == "extra_forbidden":
        known = list(SmoothnessOptions.model_fields)
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {SECTION}.{near[0]}?" if near else f"known are {', '.join(known)}"
        return f"unknown key {key}; {hint}"
    if error["type"] == "list_type":
        return f"{key} is {shown(error['input'])}; it must be a list, such as [0.5, 1]"
    return problem_in_words(key, error)
