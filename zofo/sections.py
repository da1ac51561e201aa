"""The base of every section of a configuration, with what no key of any section takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, ValidatorFunctionWrapHandler
from pydantic import field_validator as validator

MAX_COUNT: Final = 2**32 - 1  # A step is one word of 32 bits in the counters of the directions.
MAX_THREADS: Final = 1024  # Choice: more than a machine has, and few enough for its limits.
_LEAST, _MOST = 1.2e-38, 3.4e38  # of the normal numbers of float32


class Section(BaseModel):
    """Keys and values, each with a type and limits of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @validator("*", mode="wrap")
    @classmethod
    def _is_usable(
        cls, value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> Any:
        kinds = set(_parts_of(cls.model_fields[str(info.field_name)].annotation))
        is_of_numbers = bool({int, float} & kinds) and not {bool, Any} & kinds
        # pydantic would read true as 1.
        if is_of_numbers and any(isinstance(leaf, bool) for leaf in _leaves(value)):
            raise ValueError("must be a number")
        value = check(value)
        for leaf in _leaves(value):
            if isinstance(leaf, int) and abs(leaf) > MAX_COUNT:
                raise ValueError("must be less than 2^32")
            if isinstance(leaf, float) and leaf != 0 and not _LEAST <= abs(leaf) <= _MOST:
                raise ValueError(
                    f"must be finite, and 0 or from {_LEAST:g} to {_MOST:g} in size, as in float32"
                )
            if isinstance(leaf, str) and "\0" in leaf:
                raise ValueError("must not hold a zero character")
        return value


def _parts_of(kind: Any) -> Iterator[Any]:
    """The types in an annotation, such as int, None, list[int] and int in `list[int] | None`."""
    yield kind
    for part in get_args(kind):
        if not isinstance(part, str):
            yield from _parts_of(part)


def _leaves(value: Any) -> Iterator[Any]:
    """The keys and values in lists and maps, at any depth."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value
