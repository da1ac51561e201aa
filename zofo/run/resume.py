"""The configuration and the checkpoint with which a run folder is resumed.

A resumed run gives the same result as an uninterrupted one. Options that would change the result
are therefore refused. Options of the machine and of the display may differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from zofo.config.load import load_config, read_config
from zofo.config.schema import AUTO, AUTO_KEYS, RunConfig
from zofo.disk.files import problem_of_name, read_json
from zofo.errors import UserError
from zofo.saved.checkpoint_folders import newest_whole
from zofo.saved.layout import ADVICE_FILE, CONFIG_FILE, RESULT_FILE

FREE: Final = frozenset(
    (
        "output_dir",
        "log_every",
        "report_to",
        "num_threads",
        "device",
        "eval_batch_size",
        "snapshot_every",
        "overlap",
    )
)
"""Keys that may differ from those of the saved run."""
_SECTIONS: Final = ("model", "adapter", "task", "reward", "preference", "watch_task")


def resumed_config(
    folder: Path, path: Path | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """The configuration to continue a run folder with.

    Args:
        folder: the run folder.
        path: a configuration that must agree with that of the run; None for that of the run.
        overrides: "key=value", as for `load_config`.

    Raises:
        UserError: if the folder is no run folder, if a difference would change the result, or if
            the run needs code that `overrides` do not allow.
    """
    saved_path = folder / CONFIG_FILE
    problem = problem_of_name(folder)
    if problem is not None:
        raise UserError(problem)
    if not saved_path.is_file():
        raise UserError(f"{folder} holds no {CONFIG_FILE}, so it is no run folder")
    saved = read_config(saved_path)
    config = load_config(saved_path if path is None else path, overrides)
    if path is None and not overrides:
        return config
    config = _with_advised(config, saved, folder)
    found = differences(saved, config)
    if found:
        lines = "".join(
            f"\n  - {key}: {_text(then)} -> {_text(now)}" for key, (then, now) in found.items()
        )
        raise UserError(
            f"{folder} was started with another configuration (saved -> now):{lines}\n"
            "Leave these out to continue it, or begin a new run with another output_dir"
        )
    return config.model_copy(update={"output_dir": saved.output_dir})


def _with_advised(config: RunConfig, saved: RunConfig, folder: Path) -> RunConfig:
    """Replace each `auto` by the number that the run has measured for it, if there is one."""
    asked = [key for key in AUTO_KEYS if getattr(config, key) == AUTO]
    if not asked or not (folder / ADVICE_FILE).exists():
        return config
    found = read_json(folder / ADVICE_FILE)
    advised = found.get("advised", {}) if isinstance(found, dict) else {}
    return config.model_copy(update={k: getattr(saved, k) for k in asked if k in advised})


def differences(saved: RunConfig, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved, now), for the keys that change the result of a run."""
    then, now = flat_options(saved.model_dump()), flat_options(config.model_dump())
    keys = dict.fromkeys((*then, *now))
    return {
        key: (then.get(key), now.get(key))
        for key in keys
        if key not in FREE and then.get(key) != now.get(key)
    }


def is_finished(folder: Path) -> bool:
    """Whether a run has ended, which a readable result with scores shows."""
    try:
        result = read_json(folder / RESULT_FILE)
        return isinstance(result["cost"], dict) and "loss" in result["dev"]["after"]
    except (UserError, KeyError, TypeError):
        return False


def newest_checkpoint(folder: Path, report: Callable[[str], Any] | None = None) -> Path | None:
    """The undamaged checkpoint of the highest step; `report` is called for each damaged one."""
    return newest_whole(folder, report)


def flat_options(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The options with dotted keys for those of a section."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and prefix == "" and key in _SECTIONS:
            flat |= flat_options(value, f"{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
