"""Read YAML files of keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from zofo.disk.files import MAX_DEPTH, check_plain, read_text
from zofo.errors import UserError

_MAX_BYTES: Final = 1 << 20  # PyYAML takes some ten seconds for this much
_PLAIN: Final = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "null", "timestamp")
)
"""Types that YAML 1.1 sees in a word without quotes."""


class _Loader(yaml.SafeLoader):
    """Reads keys as text, so that `no`, `on` and `1` are names. Refuses aliases.

    A few aliases can expand to more nodes than memory holds. It also stops at deep nesting, before
    PyYAML needs a minute for a few thousand brackets.
    """

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
        if is_key and isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN:
            node.tag = "tag:yaml.org,2002:str"
        return node


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
