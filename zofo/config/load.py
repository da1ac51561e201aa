"""Read a configuration from YAML and `key=value` overrides, and report all its problems."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ValidationError

from zofo.config.checks import check_sections
from zofo.config.schema import (
    AUTO,
    AUTO_KEYS,
    AdapterConfig,
    ModelConfig,
    PreferenceConfig,
    RewardConfig,
    RunConfig,
    has_own_rows,
)
from zofo.disk.yaml import parse_yaml, read_yaml
from zofo.errors import UserError, problem_in_words, shown
from zofo.models.adapter_kinds import KINDS
from zofo.models.quantized import require_bitsandbytes
from zofo.models.trust import require_trust
from zofo.optim.methods import METHODS
from zofo.rewards.functions import is_code, names_of
from zofo.tasks.spec import TaskSpec

SHORTHANDS: Final = {
    "model": "name",
    "adapter": "type",
    "task": "name",
    "reward": "functions",
    "preference": "data",
    "watch_task": "name",
}
"""Section -> the key that a text in place of the section sets."""
_SECTIONS: Final[dict[str, type[BaseModel]]] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "task": TaskSpec,
    "reward": RewardConfig,
    "preference": PreferenceConfig,
    "watch_task": TaskSpec,
}
# pydantic names the members of a union in the path of an error, where a user would not write them.
_UNION_PARTS: Final = ("float", "dict[str,float]", "number", AUTO)
# Measured on SmolLM2-135M with SST-2. The larger models of the paper need about 1e-6.
_BASE_LR: Final = 1e-5


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    *,
    trust_remote_code: bool = False,
) -> RunConfig:
    """Read, check and complete a configuration by which a model may be loaded.

    Args:
        path: the YAML file; None for the defaults.
        overrides: "key=value" with a YAML value and a dotted key, such as "task.num_train=500".
        values: a mapping that replaces the file.
        trust_remote_code: whether code from the model's repository may run. An override of
            `model.trust_remote_code` allows it too, and the file cannot.

    Raises:
        UserError: with every problem found, or if the file asks for code that is not allowed.
    """
    config = read_config(path, overrides, values)
    own: dict[str, Any] = {}
    for override in overrides:
        apply_override(own, override)
    typed = own.get("model")
    typed = typed if isinstance(typed, dict) else {}
    model = config.model
    require_trust(
        "the configuration" if path is None else path,
        model.name,
        wishes_code=model.trust_remote_code,
        attention=None if "attn_implementation" in typed else model.attn_implementation,
        is_allowed=trust_remote_code or typed.get("trust_remote_code") is True,
    )
    typed = own.get("reward")
    named = names_of((typed if isinstance(typed, dict) else {}).get("functions") or [])
    for name in names_of(config.reward.functions or []):
        if is_code(name) and name not in named and not trust_remote_code:
            raise UserError(
                f"{'the configuration' if path is None else path} asks for the code of the reward "
                f"{name}, and no file can allow that: name it in this call too, such as "
                f"reward={name} on the command line"
            )
    if model.quantization is not None:
        require_bitsandbytes(f"model.quantization={model.quantization}")
    return config


def read_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> RunConfig:
    """As `load_config`, for a configuration that is only shown or compared.

    Nothing may be loaded by it, because the file may ask for code that nobody has allowed.
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
        found = most_precise(error.errors())
        problems += list(dict.fromkeys(describe_problem(e) for e in found))
        # Without the wrong keys, the checks between sections can run and report their problems too.
        for e in found:
            _drop(given, e["loc"])
        with contextlib.suppress(ValidationError):
            problems += check_sections(RunConfig.model_validate(given))
        raise UserError(join_problems(where, problems)) from None
    problems += check_sections(config)
    if problems:
        raise UserError(join_problems(where, problems))
    return _complete(config)


def most_precise(errors: Sequence[Any]) -> list[Any]:
    """The errors of pydantic without those that another one says better.

    A value of several forms has an error for each form: a map of rates is no number, and one entry
    of the map is wrong. The error of the entry says it all, and so does that of our own check.
    """

    def is_better(one: Any, other: Any) -> bool:
        outer, inner = _place(other), _place(one)
        if inner == outer:
            return bool(one["type"] == "value_error" != other["type"])
        return inner[: len(outer)] == outer

    return [error for error in errors if not any(is_better(other, error) for other in errors)]


def _place(error: Any) -> tuple[Any, ...]:
    return tuple(part for part in error["loc"] if part not in _UNION_PARTS)


def join_problems(where: str, problems: Sequence[str]) -> str:
    """One message that lists all problems of a configuration."""
    if len(problems) == 1:
        return f"{where}: {problems[0]}"
    return f"{where} has {len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems)


def _expand(given: Mapping[str, Any]) -> dict[str, Any]:
    """Expand short forms: `task: boolq` means `task: {name: boolq}`."""
    return {
        key: {SHORTHANDS[key]: value} if key in SHORTHANDS and isinstance(value, str) else value
        for key, value in given.items()
    }


def apply_override(given: dict[str, Any], override: str) -> list[str]:
    """Set "key=value" in a configuration; return a message if it has another form."""
    key, mark, text = override.partition("=")
    if not mark or not key.strip():
        return [f"{override!r} is not of the form key=value"]
    try:
        value = parse_yaml(text)
    except yaml.constructor.ConstructorError as error:
        return [f"{key.strip()}: {' '.join(str(error).split())}; correct it, or put it in quotes"]
    except yaml.YAMLError:
        value = text  # A text such as "[x" need not be YAML.
    path = key.strip().split(".")
    if len(path) == 1 and path[0] in SHORTHANDS and isinstance(value, str):
        path.append(SHORTHANDS[path[0]])
    target = given
    # Each section is copied before it changes, because the caller's mapping may share it.
    for part in path[:-1]:
        inner = target.get(part)
        target[part] = dict(inner) if isinstance(inner, dict) else {}
        target = target[part]
    target[path[-1]] = value
    return []


def _drop(given: dict[str, Any], path: Sequence[Any]) -> None:
    """Remove the key that an error names; the path may also name a member of a union below it."""
    target: Any = given
    for part in path[:-1]:
        if not isinstance(target, dict) or not isinstance(target.get(part), dict):
            break
        target = target[part]
        path = path[1:]
    target.pop(path[0], None)


def describe_problem(error: Any) -> str:
    """Describe one of pydantic's errors: the value, the constraint and the nearest known name."""
    path = error["loc"]
    key = ".".join(map(str, _place(error)))
    if error["type"] == "extra_forbidden":
        section: type[BaseModel] = RunConfig
        if len(path) > 1:
            section = _SECTIONS.get(str(path[0]), RunConfig)
        known = list(section.model_fields)
        near = difflib.get_close_matches(str(path[-1]), known, n=1)
        if not near:
            # If another section has the key, its prefix was probably forgotten.
            homes = (n for n, model in _SECTIONS.items() if str(path[-1]) in model.model_fields)
            near = [f"{name}.{path[-1]}" for name in sorted(homes)][:1]
        hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
        return f"unknown key {key}{hint}"
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"{key} is {shown(error['input'])}; it takes keys and values of its own"
    # A study has lists of these rates, so the key stands before a number there.
    if (path[0] == "base_lr" or "base_lr" in path[1:-1]) and error["type"] != "value_error":
        return f"{key} is {shown(error['input'])}; it must be a number" + (
            "" if key != "base_lr" else ", a map from patterns of weight names to numbers, or auto"
        )
    if error["input"] == AUTO:
        return f"{key} is auto; only {', '.join(AUTO_KEYS)} can be"
    text = problem_in_words(key, error)
    if key in AUTO_KEYS and error["type"] in ("float_parsing", "float_type"):
        text += ", or auto"
    return text


def _complete(config: RunConfig) -> RunConfig:
    """Fill in the values that depend on the method and on the adapter."""
    update: dict[str, Any] = {}
    method = METHODS[config.method]
    if not method.needs_adapter:
        update["adapter"] = AdapterConfig(type="none")
    if config.base_lr is None and method.base != "frozen":
        update["base_lr"] = _BASE_LR
    is_known = config.adapter.type in KINDS and config.adapter.config_file is None
    kind = KINDS[config.adapter.type if is_known else "lora"]
    if config.adapter_lr is None and method.needs_adapter:
        update["adapter_lr"] = kind.lr if method.adapter == "first" else kind.zo_lr
    if method.adapter == "zeroth" and "eps" not in config.model_fields_set:
        update["eps"] = kind.zo_eps
    if config.steps is None and config.epochs is None:
        update["steps"] = 200
    if config.zo_objective == "reward":
        update |= {"distribution": "rank-one", "directions_per_step": "rows"}
    if has_own_rows(config) and "select_best" not in config.model_fields_set:
        update["select_best"] = False  # The dev loss does not tell which base is better at them.
    if config.zo_objective == "preference":
        pairs = config.preference
        if pairs.data is None:
            update["task"] = _of_chosen(config.task, pairs)
        if pairs.max_length is None:
            update["preference"] = pairs.model_copy(update={"max_length": config.task.max_length})
    return config.model_copy(update=update)


def _of_chosen(task: TaskSpec, pairs: PreferenceConfig) -> TaskSpec:
    """The task whose examples are the chosen answers, unless it names other columns."""
    columns = {
        "completion": {"prompt": pairs.prompt, "completion": pairs.chosen},
        "chat": {"messages": f"{pairs.prompt}+{pairs.chosen}"},
    }[task.name]
    new = {key: value for key, value in columns.items() if key not in task.model_fields_set}
    return task.model_copy(update=new)
