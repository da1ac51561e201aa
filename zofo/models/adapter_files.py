"""Read a configuration of peft from a JSON or YAML file."""

from __future__ import annotations

import difflib
import enum
import typing
from pathlib import Path
from typing import Any

from torch import nn

from zofo.console import quiet
from zofo.disk.files import parse_json, read_text, refusing
from zofo.disk.yaml import read_yaml
from zofo.errors import UserError, shown
from zofo.models.limits import check_adapter_values


def config_from_file(path: Path, task: str, model: nn.Module) -> Any:
    """Read a `peft.PeftConfig`.

    Args:
        path: a JSON file, if it ends so, or else a YAML file; it names its `peft_type`.
        task: the `task_type` of a file that names none.
        model: the base, whose size limits what the file may ask for.

    Raises:
        UserError: if the file cannot be read, or is no configuration of peft.
    """
    from peft import PeftType, get_peft_config

    values = _read(path)
    if not isinstance(values, dict) or "peft_type" not in values:
        raise UserError(
            f"the adapter file {path} has no peft_type; it must be a peft configuration, such as "
            '{"peft_type": "LORA", "r": 8}'
        )
    _check_choice(path, "peft_type", values["peft_type"], PeftType)
    values = {"task_type": task, **values, "inference_mode": False}
    remedy = "correct the file, or have peft write one"
    with refusing(f"the adapter file {path} is no valid peft configuration", remedy), quiet():
        check_adapter_values(values, model)
        config = get_peft_config(values)
        # peft accepts any text for some fields and then behaves as if the field were not there.
        for key, hint in typing.get_type_hints(type(config)).items():
            for kind in (hint, *typing.get_args(hint)):
                is_enum = isinstance(kind, type) and issubclass(kind, enum.Enum)
                if key in values and is_enum:
                    _check_choice(path, key, values[key], kind)
    return config


def _read(path: Path) -> Any:
    name = "the adapter file"
    if path.suffix != ".json":
        return read_yaml(path, name)
    try:
        text = read_text(path)
    except UserError as error:
        raise UserError(f"{name} {error}") from error
    with refusing(f"{name} {path} is not valid json", "correct it"):
        return parse_json(text)


def _check_choice(path: Path, key: str, value: Any, kind: type[enum.Enum]) -> None:
    """Refuse a value that is no member of an enumeration."""
    choices = [str(member.value) for member in kind]
    if value is not None and value not in choices:
        near = difflib.get_close_matches(str(value).upper(), choices, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"the adapter file {path} has {key} {shown(value)}; {hint}choose one of "
            f"{', '.join(choices)}"
        )
