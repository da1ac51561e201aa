"""The configuration of a run: read from YAML and `key=value`, checked whole, written back.

All problems are reported together, an unknown key with the nearest known one. Learning rates and
lengths that are left out are filled in by method and adapter, so that the written configuration
says everything that was used.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from zofo.disk.yaml import parse_yaml, read_yaml
from zofo.errors import UserError
from zofo.models.adapter_kinds import KINDS, AdapterType
from zofo.tasks.spec import TaskSpec

AUTO: Final = "auto"
AUTO_KEYS: Final = ("base_lr", "adapter_lr", "eps")
"""What `zofo.run.auto` finds before a run begins."""


def _is_auto(value: Any) -> str:
    return AUTO if value == AUTO else "number"


_Auto = Annotated[Literal["auto"], Tag(AUTO)]
Rate = Annotated[Annotated[float, Field(ge=0), Tag("number")] | _Auto, Discriminator(_is_auto)]
Radius = Annotated[Annotated[float, Field(gt=0), Tag("number")] | _Auto, Discriminator(_is_auto)]
BaseRate = Annotated[
    Annotated[float | dict[str, float], Tag("number")] | _Auto, Discriminator(_is_auto)
]

_SHORTHANDS: Final = {"model": "name", "adapter": "type", "task": "name"}
_BASE_LR: Final = 1e-5
"""Measured on SmolLM2-135M, SST-2; the paper's models are larger and want about 1e-6."""
FIRST_ORDER_BASE_LR: Final = 1e-5
"""Where the search for fo-ft's rate begins: usual for full fine-tuning with AdamW."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*")
    @classmethod
    def _is_of_reasonable_size(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise ValueError("must fit in 64 bits")
        if isinstance(value, float) and not math.isfinite(value) and info.field_name != "base_lr":
            raise ValueError("must be finite")
        return value


class ModelConfig(_Section):
    """The base."""

    name: str = Field("smollm2-135m", description="hub id, folder, or smollm2-135m, minilm")
    head: Literal["auto", "causal-lm", "classification", "seq2seq"] = Field(
        "auto",
        description="seq2seq: encoder-decoders; classification: a fresh head on an encoder",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the base; peft keeps adapters in float32"
    )
    revision: str | None = Field(None, description="branch, tag or commit of the hub id")
    trust_remote_code: bool = Field(False, description="run code from the model's repository")
    attn_implementation: str | None = Field(None, description="as in transformers")


class AdapterConfig(_Section):
    """The PEFT module."""

    type: AdapterType = Field("lora", description="see adapters.md; none for fo-ft and zo-ft")
    r: int = Field(8, ge=1, description="rank of LoRA and its kin (paper)")
    alpha: float = Field(16, gt=0, description="scale alpha / r (paper); rslora: alpha / √r")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the input of LoRA and its kin")
    targets: str | list[str] | None = Field(
        None,
        description="modules of LoRA, its kin, IA3: names, all-linear, or peft's choice",
    )
    num_virtual_tokens: int | None = Field(
        None, ge=1, description="length of prefix (default 5), prompt and p-tuning (default 10)"
    )
    init_text: str | None = Field(None, description="initial text of prompt or prefix")
    config_file: str | None = Field(None, description="any peft configuration, JSON or YAML")

    @property
    def label(self) -> str:
        """What results and folders call it: its type, or the name of its file."""
        return self.type if self.config_file is None else Path(self.config_file).stem


class RunConfig(_Section):
    """One run."""

    method: Literal["hybrid", "fo-peft", "zo-peft", "fo-ft", "zo-ft"] = Field(
        "hybrid", description="which block moves by what"
    )
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    task: TaskSpec = TaskSpec()

    base_lr: BaseRate | None = Field(
        None, description="learning rate of the base, pattern of weight names -> rate, or auto"
    )
    adapter_lr: Rate | None = Field(None, description="learning rate of the adapter, or auto")
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="of the first-order block (paper: sgd)"
    )
    scheduler: str = Field("constant", description="transformers' schedules (paper: constant)")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    base_weight_decay: float = Field(0.0, ge=0, description="decoupled, of the base")
    adapter_weight_decay: float = Field(0.0, ge=0, description="of the adapter's optimizer")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="clip the first-order gradient to this norm; null: do not"
    )

    eps: Radius = Field(
        1e-3,
        description="smoothing radius (as in MeZO), or auto; zo-peft of a prefix: 0.1 (paper)",
    )
    estimator: Literal["forward", "central"] = Field(
        "forward", description="forward (paper): 1 extra forward; central: 2"
    )
    num_directions: int = Field(1, ge=1, description="directions a step (paper: 1)")
    distribution: Literal["rademacher", "gaussian"] = Field(
        "rademacher", description="of the directions (paper: gaussian)"
    )
    base_every: int = Field(
        1, ge=1, description="steps from one move of the base to the next (paper: 1)"
    )
    base_batch_fraction: float = Field(
        1.0, gt=0, le=1, description="part of each batch that the loss difference is taken on"
    )
    zo_objective: Literal["loss", "accuracy", "f1"] = Field(
        "loss",
        description="what the zeroth-order block lowers: the training loss, 1 - accuracy or 1 - F1",
    )
    replay_dropout: bool = Field(True, description="same masks for all evaluations of a step")
    self_check: bool = Field(True, description="watch the first perturbed forward")
    overlap: bool = Field(
        False, description="on CUDA, perturb a layer while the one before it runs; same bits"
    )
    on_non_finite: Literal["stop", "skip"] = Field(
        "stop", description="at a loss that is not finite: stop with a checkpoint, or skip the step"
    )

    steps: int | None = Field(None, ge=1, description="optimiser steps; default 200")
    epochs: float | None = Field(None, gt=0, description="instead of steps")
    batch_size: int = Field(8, ge=1, description="rows a micro-batch")
    accumulation: int = Field(1, ge=1, description="micro-batches a step")
    eval_batch_size: int = Field(32, ge=1, description="rows a forward when evaluating")
    sampling: Literal["reshuffle", "shuffle-once", "with-replacement"] = Field(
        "reshuffle", description="order of the rows (paper: reshuffle)"
    )
    eval_every: int | None = Field(
        None, ge=1, description="steps between evaluations on dev; default: a quarter of the run"
    )
    select_best: bool = Field(True, description="keep the checkpoint with the best dev score")
    select_by: Literal["loss", "accuracy", "f1"] = Field(
        "loss", description="which dev score; loss has less noise"
    )
    early_stopping: float | None = Field(
        None,
        ge=0,
        description="from half of the run on, stop at a dev loss this far (nats) above the start's",
    )
    measure_test: bool = Field(True, description="score the test rows before and after training")
    log_every: int = Field(10, ge=1, description="steps between log lines")
    snapshot_every: int | None = Field(
        None,
        ge=1,
        description="steps between copies of the base (its size), so that resuming replays less",
    )
    gradient_checkpointing: bool = Field(False, description="in the first-order pass")

    seed: int = Field(0, ge=0, lt=2**32, description="of everything")
    device: str = Field("auto", description="auto, cpu, cuda, mps")
    num_threads: int | None = Field(None, ge=1, description="of the CPU; default: torch's choice")
    output_dir: str | None = Field(
        None, description="run folder; default: runs/TASK-METHOD-ADAPTER, numbered"
    )
    report_to: list[str] = Field([], description="tensorboard and other integrations of Trainer")

    @property
    def auto_keys(self) -> tuple[str, ...]:
        """What is to be found before the run begins; only what its method has a use for."""
        used = _auto_keys_of(self.method)
        return tuple(k for k in AUTO_KEYS if getattr(self, k) == AUTO and k in used)

    def to_yaml(self) -> str:
        """The configuration as YAML that reads back to the same."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def _auto_keys_of(method: str) -> tuple[str, ...]:
    """The keys among `AUTO_KEYS` that move something."""
    return {
        "hybrid": ("base_lr", "adapter_lr", "eps"),
        "fo-peft": ("adapter_lr",),
        "zo-peft": ("adapter_lr", "eps"),
        "fo-ft": ("base_lr",),
        "zo-ft": ("base_lr", "eps"),
    }[method]


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Read, check and complete a configuration.

    Args:
        path: YAML file; None: defaults.
        overrides: "key=value", dotted for sections: "task.num_train=500"; the value is YAML.
        values: a mapping instead of a file.

    Raises:
        UserError: with every problem found.
    """
    given: dict[str, Any] = dict(values or {})
    where = "the configuration"
    if path is not None:
        where = str(path)
        given = read_yaml(Path(path))
    problems: list[str] = []
    given = _expand(given)
    for override in overrides:
        problems += apply_override(given, override)
    try:
        config = RunConfig.model_validate(given)
    except ValidationError as error:
        found = error.errors()
        # What is wrong inside of a map of rates is said once, of its entry.
        inner = [
            e for e in found if not (e["loc"][0] == "base_lr" and isinstance(e["input"], dict))
        ]
        found = inner or found
        problems += list(dict.fromkeys(describe_problem(e) for e in found))
        # Whatever is wrong with the rest is reported in the same breath.
        for e in found:
            _drop(given, e["loc"])
        with contextlib.suppress(ValidationError):
            problems += _check(RunConfig.model_validate(given))
        raise UserError(join_problems(where, problems)) from None
    problems += _check(config)
    if problems:
        raise UserError(join_problems(where, problems))
    return _complete(config)


def join_problems(where: str, problems: Sequence[str]) -> str:
    """One message of all that is wrong with a configuration."""
    if len(problems) == 1:
        return f"{where}: {problems[0]}"
    return f"{where} has {len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems)


def _expand(given: Mapping[str, Any]) -> dict[str, Any]:
    """`task: boolq` is short for `task: {name: boolq}`."""
    return {
        key: {_SHORTHANDS[key]: value} if key in _SHORTHANDS and isinstance(value, str) else value
        for key, value in given.items()
    }


def apply_override(given: dict[str, Any], override: str) -> list[str]:
    """Write "key=value" into a configuration; returns what is wrong with it."""
    key, mark, text = override.partition("=")
    if not mark or not key.strip():
        return [f"{override!r} is not of the form key=value"]
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        value = text
    path = key.strip().split(".")
    if len(path) == 1 and path[0] in _SHORTHANDS and isinstance(value, str):
        path.append(_SHORTHANDS[path[0]])
    target = given
    for part in path[:-1]:
        inner = target.get(part)
        target[part] = dict(inner) if isinstance(inner, dict) else {}
        target = target[part]
    target[path[-1]] = value
    return []


def _drop(given: dict[str, Any], path: Sequence[Any]) -> None:
    target: Any = given
    for part in path[:-1]:
        if not isinstance(target, dict) or not isinstance(target.get(part), dict):
            break
        target = target[part]
        path = path[1:]
    target.pop(path[0], None)


def _section(path: Sequence[Any]) -> type[BaseModel]:
    sections: dict[str, type[BaseModel]] = {
        "model": ModelConfig,
        "adapter": AdapterConfig,
        "task": TaskSpec,
    }
    return sections.get(str(path[0]), RunConfig) if len(path) > 1 else RunConfig


def _shown(value: Any) -> str:
    """A value as it was given, unless it is endless."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)


_UNION_PARTS: Final = ("float", "dict[str,float]", "number", AUTO)


def describe_problem(error: Any) -> str:
    """One of pydantic's errors in words: the value, the constraint, the nearest known name."""
    path = error["loc"]
    key = ".".join(str(part) for part in path if part not in _UNION_PARTS)
    if error["type"] == "extra_forbidden":
        known = list(_section(path).model_fields)
        inner = {
            f"{name}.{field}"
            for name, section in (
                ("model", ModelConfig),
                ("adapter", AdapterConfig),
                ("task", TaskSpec),
            )
            for field in section.model_fields
        }
        near = difflib.get_close_matches(str(path[-1]), known, n=1)
        if not near:
            homes = sorted(k for k in inner if k.endswith(f".{path[-1]}"))
            near = homes[:1]
        hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
        return f"unknown key {key}{hint}"
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"{key} is {_shown(error['input'])}; it takes keys and values of its own"
    if path[0] == "base_lr":
        return f"{key} is {_shown(error['input'])}; it must be a number" + (
            "" if key != "base_lr" else ", a map from patterns of weight names to numbers, or auto"
        )
    if error["input"] == AUTO:
        return f"{key} is auto; only {', '.join(AUTO_KEYS)} can be"
    message = re.sub(r"^Input should be ", "must be ", error["msg"])
    message = re.sub(r", unable to parse string as an? \w+$", "", message)
    message = re.sub(r"^Value error, ", "", message)
    text = f"{key} is {_shown(error['input'])}; it {message}"
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        choices = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        near = difflib.get_close_matches(error["input"], choices, n=1)
        text += f" (did you mean {near[0]}?)" if near else ""
    if key in AUTO_KEYS and error["type"] in ("float_parsing", "float_type"):
        text += ", or auto"
    return text


def _check(config: RunConfig) -> list[str]:
    """What no single field shows."""
    from zofo.tasks import check_spec

    problems = check_spec(config.task)
    full = config.method in ("fo-ft", "zo-ft")
    if full and "adapter" in config.model_fields_set and config.adapter.type != "none":
        problems.append(
            f"method {config.method} moves no adapter; remove adapter, or choose hybrid, fo-peft "
            "or zo-peft"
        )
    if not full and config.adapter.type == "none" and config.adapter.config_file is None:
        problems.append(
            f"method {config.method} moves an adapter and adapter.type is none; choose one, "
            "such as lora or prompt, or method fo-ft or zo-ft"
        )
    is_prefix = config.adapter.type == "prefix" and config.adapter.config_file is None
    if config.gradient_checkpointing and is_prefix and not full:
        problems.append(
            "gradient_checkpointing is true and drops the cache that holds a prefix; set it to "
            "false, or choose another adapter"
        )
    if config.base_every > 1 and config.method in ("zo-peft", "zo-ft"):
        problems.append(
            f"base_every is {config.base_every} and method {config.method} moves nothing else in "
            "the other steps; leave it at 1, or choose method hybrid"
        )
    if config.base_batch_fraction < 1 and config.method in ("zo-peft", "zo-ft"):
        problems.append(
            f"base_batch_fraction is {config.base_batch_fraction} and method {config.method} uses "
            "the rest of the batch for nothing; lower batch_size, or choose method hybrid"
        )
    if config.base_batch_fraction < 1 and config.sampling == "shuffle-once":
        problems.append(
            f"base_batch_fraction is {config.base_batch_fraction} and sampling is shuffle-once, so "
            "the base would never see the last rows of a batch; choose sampling reshuffle"
        )
    problems += _check_scores(config)
    asked = [k for k in config.auto_keys if k == "eps" or _moves_by_differences(config, k)]
    if asked and config.zo_objective != "loss":
        problems.append(
            f"{' and '.join(asked)} {'is' if len(asked) == 1 else 'are'} auto, which measures the "
            f"training loss, and zo_objective is {config.zo_objective}; give a number, or set "
            "zo_objective=loss"
        )
    if config.steps is not None and config.epochs is not None:
        problems.append("steps and epochs are both given; keep one")
    rates = config.base_lr if isinstance(config.base_lr, dict) else {"": config.base_lr}
    for pattern, rate in rates.items():
        if isinstance(rate, float) and not 0 <= rate < float("inf"):
            name = f"base_lr[{pattern!r}]" if pattern else "base_lr"
            problems.append(f"{name} is {rate}; a learning rate is a finite number of at least 0")
    try:
        from transformers import SchedulerType

        schedulers = [str(s.value) for s in SchedulerType]
    except ImportError:
        schedulers = []
    if schedulers and config.scheduler not in schedulers:
        near = difflib.get_close_matches(config.scheduler, schedulers, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        problems.append(
            f"scheduler is {config.scheduler!r}; {hint}choose one of {', '.join(schedulers)}"
        )
    return problems


def _moves_by_differences(config: RunConfig, key: str) -> bool:
    from zofo.optim.methods import METHODS

    return getattr(METHODS[config.method], key.removesuffix("_lr")) == "zeroth"


def _check_scores(config: RunConfig) -> list[str]:
    """Scores that the task does not have."""
    from zofo.tasks import writes_answers, writes_text

    problems = []
    name = config.task.name
    asked = [key for key in ("zo_objective", "select_by") if getattr(config, key) == "f1"]
    if asked and not writes_answers(config.task):
        remedy = "set task.metric=f1" if name == "completion" else "choose accuracy"
        problems.append(f"{' and '.join(asked)} is f1 and task {name} scores no answers; {remedy}")
    if config.zo_objective == "accuracy" and writes_text(config.task):
        remedy = "f1" if writes_answers(config.task) else "loss"
        problems.append(
            f"zo_objective is accuracy and task {name} has no candidates to choose from; choose "
            f"{remedy}"
        )
    return problems


def _complete(config: RunConfig) -> RunConfig:
    update: dict[str, Any] = {}
    if config.method in ("fo-ft", "zo-ft"):
        update["adapter"] = AdapterConfig(type="none")
    if config.base_lr is None and config.method in ("hybrid", "fo-ft", "zo-ft"):
        update["base_lr"] = _BASE_LR
    is_known = config.adapter.type in KINDS and config.adapter.config_file is None
    kind = KINDS[config.adapter.type if is_known else "lora"]
    if config.adapter_lr is None and config.method in ("hybrid", "fo-peft"):
        update["adapter_lr"] = kind.lr
    if config.adapter_lr is None and config.method == "zo-peft":
        update["adapter_lr"] = kind.zo_lr
    if config.method == "zo-peft" and "eps" not in config.model_fields_set:
        update["eps"] = kind.zo_eps
    if config.steps is None and config.epochs is None:
        update["steps"] = 200
    return config.model_copy(update=update)


def idle_options(config: RunConfig) -> list[str]:
    """Options given by the user that have no effect with the chosen method and adapter."""
    idle = {
        "fo-peft": (
            "base_lr",
            "eps",
            "estimator",
            "num_directions",
            "base_every",
            "base_batch_fraction",
            "overlap",
            "distribution",
            "zo_objective",
            "base_weight_decay",
            "snapshot_every",
        ),
        "zo-peft": (
            "base_lr",
            "optimizer",
            "max_grad_norm",
            "base_weight_decay",
            "snapshot_every",
        ),
        "zo-ft": (
            "adapter_lr",
            "adapter_weight_decay",
            "optimizer",
            "max_grad_norm",
            "snapshot_every",
        ),
        "fo-ft": (
            "adapter_lr",
            "adapter_weight_decay",
            "eps",
            "estimator",
            "num_directions",
            "base_every",
            "base_batch_fraction",
            "overlap",
            "zo_objective",
            "snapshot_every",
        ),
        "hybrid": (),
    }
    found = [
        f"{key} has no effect with method {config.method}"
        for key in idle[config.method]
        if getattr(config, key) != RunConfig.model_fields[key].default
    ]
    if config.method == "hybrid" and config.base_batch_fraction < 1 and share_of(config) == 1:
        found.append(f"base_batch_fraction has no effect with batch_size {config.batch_size}")
    return found + _idle_adapter_options(config.adapter)


def _idle_adapter_options(adapter: AdapterConfig) -> list[str]:
    used, choice = {"config_file"}, "adapter.config_file"
    if adapter.config_file is None:
        taken = KINDS[adapter.type].options if adapter.type in KINDS else ()
        used, choice = {"type", "config_file", *taken}, f"adapter {adapter.type}"
    return [
        f"adapter.{key} has no effect with {choice}"
        for key, field in AdapterConfig.model_fields.items()
        if key not in used and getattr(adapter, key) != field.default
    ]


def share_of(config: RunConfig) -> float:
    """Share of a full micro-batch that the loss difference is taken on."""
    from zofo.optim.part import num_rows_of

    return num_rows_of(config.base_batch_fraction, config.batch_size) / config.batch_size
