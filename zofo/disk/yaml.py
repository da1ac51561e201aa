"""Read and write YAML 1.2 of keys and values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

import yaml

from zofo.disk.files import read_text
from zofo.disk.plain import MAX_DEPTH, check_plain
from zofo.errors import UserError, shown

_MAX_BYTES: Final = 1 << 20  # PyYAML takes some ten seconds for this much
_TAG: Final = "tag:yaml.org,2002:"
_STRUCTURE: Final = (f"{_TAG}str", f"{_TAG}seq", f"{_TAG}map", None)  # None: every other tag
_FLOAT: Final = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_SPECIAL_FLOAT: Final = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_SCALARS: Final[dict[str, tuple[str, str, Callable[[str], Any]]]] = {
    "null": (r"null|Null|NULL|~|", "nN~", lambda _: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text[0] in "tT"),
    "int": (
        r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
        "-+0123456789",
        lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    ),
    "float": (
        f"{_FLOAT}|{_SPECIAL_FLOAT}",
        "-+.0123456789",
        lambda text: float(text if text[-1] in ".0123456789" else text.replace(".", "")),
    ),
}
"""The words without quotes that are no texts in YAML 1.2 (core schema, section 10.3.2):
type -> its words, their first characters, and their value."""


class _Loader(yaml.SafeLoader):
    """Reads the core schema of YAML 1.2: `yes`, `on`, `1:30` and `2026-01-01` are texts.

    Keys are texts whatever they look like, so that `1` and `null` are names. A key that appears
    twice is refused, and so are aliases, because a few can expand to more nodes than memory holds.
    It also stops at deep nesting, before PyYAML needs a minute for a few thousand brackets.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  An instance variable in its types.
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: build for tag, build in yaml.SafeLoader.yaml_constructors.items() if tag in _STRUCTURE
    }
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            where = self.peek_event().start_mark
            problem = "aliases are not read, write the value out"
            raise yaml.composer.ComposerError(None, None, problem, where)
        if self.depth > MAX_DEPTH:
            where = self.peek_event().start_mark
            problem = f"lists and maps are nested more than {MAX_DEPTH} deep"
            raise yaml.composer.ComposerError(None, None, problem, where)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        # The parser asks for a key without an index, and for the value with its key as the index.
        is_key = isinstance(parent, yaml.MappingNode) and index is None
        if is_key and isinstance(node, yaml.ScalarNode) and node.tag.removeprefix(_TAG) in _SCALARS:
            node.tag = f"{_TAG}str"
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        # Not the method of SafeLoader, which knows the merge keys of YAML 1.1.
        value = yaml.constructor.BaseConstructor.construct_mapping(self, node, deep=deep)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {shown(key.value)} appears twice, remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return value


class _Dumper(yaml.SafeDumper):
    """Quotes each text that is no text in YAML 1.1 or in YAML 1.2."""

    def represent_str(self, data: str) -> Any:
        # PyYAML quotes a text with U+0085 so that it reads back as a blank, but for double quotes.
        is_plain = data.replace("\n", "").isprintable()
        return self.represent_scalar(f"{_TAG}str", data, style=None if is_plain else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def _constructor(kind: str) -> Callable[[_Loader, Any], Any]:
    """Turn a word into a value; also for a word with a tag, such as `!!int 1:30`."""
    pattern, _, value = _SCALARS[kind]

    def construct(loader: _Loader, node: Any) -> Any:
        text = loader.construct_scalar(node)
        if not re.fullmatch(pattern, text):
            problem = f"{shown(text)} is no {kind} of YAML 1.2"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value(text)

    return construct


for _kind, (_pattern, _first, _) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _starts = [*_first, ""] if _kind == "null" else list(_first)
        _class.add_implicit_resolver(_TAG + _kind, re.compile(rf"^(?:{_pattern})$"), _starts)
    _Loader.add_constructor(_TAG + _kind, _constructor(_kind))


def yaml_text(values: Mapping[str, Any]) -> str:
    """Keys and values as YAML, which `parse_yaml` reads back to equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str) -> Any:
    """Parse YAML and check it with `check_plain`.

    Raises:
        yaml.YAMLError: also for invalid dates, and for what `check_plain` refuses.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
        check_plain(value)
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error
    return value


def read_yaml(path: Path, name: str = "the configuration") -> dict[str, Any]:
    """The keys and values of a YAML file.

    Args:
        path: the file.
        name: what the file is, for messages.

    Raises:
        UserError: if the file cannot be read, or holds anything but keys and values.
    """
    if path.is_dir():
        raise UserError(
            f"{name} {path} is a folder; name a YAML file, or continue a folder with --resume"
        )
    try:
        value = parse_yaml(read_text(path, max_bytes=_MAX_BYTES))
    except UserError as error:
        raise UserError(f"{name} {error}") from error
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())  # PyYAML writes several lines.
        raise UserError(f"{name} {path} is not valid YAML: {said}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{name} {path} must be keys and values, such as 'steps: 200'")
    return {str(key): entry for key, entry in value.items()}
