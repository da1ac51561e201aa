"""Read YAML files of keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from zofo.errors import UserError

_PLAIN: Final = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "null", "timestamp")
)
"""Types that YAML 1.1 sees in a word without quotes."""


class _Loader(yaml.SafeLoader):
    """Reads keys as text, so that `no`, `on` and `1` are names. Refuses aliases.

    A few aliases can expand to more nodes than memory holds.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            where = self.peek_event().start_mark
            problem = "aliases are not read, write the value out"
            raise yaml.composer.ComposerError(None, None, problem, where)
        node = super().compose_node(parent, index)
        # The parser asks for a key without an index, and for the value with its key as the index.
        is_key = isinstance(parent, yaml.MappingNode) and index is None
        if is_key and isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN:
            node.tag = "tag:yaml.org,2002:str"
        return node


def parse_yaml(text: str) -> Any:
    """Parse YAML. Invalid dates and too deep a nesting also raise `yaml.YAMLError`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, TypeError, RecursionError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        UserError: if the file cannot be read, or holds anything but keys and values.
    """
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"the configuration {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(
            f"the configuration {path} is a folder; name a YAML file, or continue a folder with "
            "--resume"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the configuration {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"the configuration {path} is not valid YAML: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"the configuration {path} must be keys and values, such as 'steps: 200'")
    return {str(key): entry for key, entry in value.items()}
