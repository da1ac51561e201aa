"""YAML that people write: keys and values, read without surprises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from zofo.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML without aliases, a few of which can stand for more nodes than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None,
                None,
                "aliases are not read, write the value out",
                self.peek_event().start_mark,
            )
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> Any:
    """Raises yaml.YAMLError, also for what PyYAML lets through: bad dates, too deep a nesting."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, TypeError, RecursionError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML file, unchecked.

    Raises:
        UserError: if it cannot be read or holds something else.
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
