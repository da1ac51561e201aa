"""Rows and rewards of the package reasoning-gym, which makes questions and checks their answers.

    reasoning-gym:chain_sum?size=500&seed=1&max_terms=3     a source of rows, as a file is

Each row has a prompt and a completion, and the columns `dataset` and `entry`, by which the reward
`reasoning-gym` scores an answer. The rows are a pure function of the source's text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import parse_qsl

from zofo.disk.yaml import parse_yaml
from zofo.errors import UserError, shown

PREFIX: Final = "reasoning-gym:"
_MAX_ROWS: Final = 1_000_000  # Choice.
_INSTALL: Final = (
    "pip install 'zofo[reasoning]' && pip install --no-deps reasoning-gym (its own requirements "
    "are exact versions)"
)


def is_generated(source: str) -> bool:
    """Whether a source of rows names a generator of reasoning-gym."""
    return source.startswith(PREFIX)


def generated_rows(source: str) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a source, numbered from 1.

    Raises:
        UserError: if the package is missing, or the source names no generator or wrong options.
    """
    name, _, query = source.removeprefix(PREFIX).partition("?")
    options = {key: parse_yaml(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    options = {"size": 500, "seed": 0} | options
    size = options["size"]
    if not isinstance(size, int) or not 1 <= size <= _MAX_ROWS:
        raise UserError(f"{source} has size {shown(size)}; give 1 to {_MAX_ROWS}")
    make = _factory(source).create_dataset
    try:
        entries = list(make(name, **options))
    except Exception as error:  # whatever a generator raises to refuse its options
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{source} cannot make rows ({said}); write it as "
            f"{PREFIX}chain_sum?size=500&seed=0, with the options of that data set"
        ) from error
    rows = []
    for i, entry in enumerate(entries, start=1):
        plain = json.loads(json.dumps(entry, default=str))
        prompt, answer = f"{entry['question'].rstrip()}\nAnswer:", f" {entry['answer']}"
        rows.append((i, {"prompt": prompt, "completion": answer, "dataset": name, "entry": plain}))
    return rows


def reward(
    completions: Sequence[Any], dataset: Sequence[str], entry: Sequence[Any], **_: Any
) -> list[float]:
    """The package's score of each answer, in [0, 1]; a short answer ends with its first line."""
    from zofo.rewards.checkers import text_of

    score_of = _factory("the reward reasoning-gym").get_score_answer_fn
    found = []
    for completion, name, question in zip(completions, dataset, entry, strict=True):
        text = text_of(completion).strip()
        if "\n" not in str(question["answer"]):
            text = text.split("\n")[0].strip()
        found.append(float(score_of(name)(text, question)))
    return found


def _factory(needed_by: str) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(
            f"{needed_by} needs the package reasoning-gym ({error}); install it: {_INSTALL}"
        ) from error
    return reasoning_gym
