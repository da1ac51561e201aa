"""`zofo export`, `info`, `replay` and `verify`: what a run leaves, and what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from zofo.console import replay_bar
from zofo.saved.export import export_model, replay_base
from zofo.saved.export_card import Exported
from zofo.saved.inspect import Info, inspect
from zofo.saved.verify import verify as checks_of


def export(
    folder: Path, to: Path, dtype: str | None, max_shard_size: str, trust_remote_code: bool
) -> None:
    """Write a plain Hugging Face folder."""
    show_export(
        export_model(
            folder,
            to,
            dtype=dtype,
            max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
        )
    )


def show_export(exported: Exported) -> None:
    """Where it lies, what was checked, how to use it."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    size = f"{exported.size_bytes / 2**20:.1f} MiB, {exported.dtype}"
    parts = "one plain model" if exported.is_merged else "base, and adapter apart in its adapter/"
    console.print(f"export    {exported.path} ({size}): {parts}")
    console.print(
        f"checked   logits on {exported.inputs} differ from the trained model's by at most "
        f"{exported.max_logit_difference:.2g} ({exported.tolerance:.2g} is allowed)"
    )
    console.print(f"in Python {exported.usage}")


def info(path: Path, as_json: bool) -> None:
    """Print what a folder is."""
    found = inspect(path)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        _show_info(found)


def replay(
    path: Path,
    step: int,
    to: Path,
    dtype: str | None,
    max_shard_size: str,
    trust_remote_code: bool,
) -> None:
    """Write the base as it was after some updates."""
    with replay_bar(Console(stderr=True)) as progress:
        exported = replay_base(
            path,
            to,
            step,
            dtype=dtype,
            max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    console = Console(highlight=False, soft_wrap=True, markup=False)
    size = f"{exported.size_bytes / 2**20:.1f} MiB, {exported.dtype}"
    console.print(f"base      {exported.path} ({size}): after {step} updates, without adapter")
    console.print(f"in Python {exported.usage}")


def verify(path: Path, trust_remote_code: bool) -> bool:
    """Print each check as it is done; False if one failed."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    is_sound = True
    for check in checks_of(path, trust_remote_code=trust_remote_code):
        word = {True: "ok", False: "FAILED", None: "-"}[check.is_sound]
        console.print(f"{check.name:<12}{word:<8}{check.detail}")
        is_sound &= check.is_sound is True
    console.print(f"{path} is {'sound' if is_sound else 'NOT sound'}")
    return is_sound


def _show_info(found: Info) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False)
    whole = "whole" if found.is_whole else f"NOT whole: {found.problem}"
    console.print(f"{found.path}: {found.kind}, {whole}")
    checkpoints = ", ".join(
        f"{step}{'' if is_whole else ' (damaged)'}" for step, is_whole in found.checkpoints.items()
    )
    rows = {
        "method": found.method,
        "base": found.base,
        "fingerprint": found.base_fingerprint,
        "adapter": found.adapter,
        "task": found.task,
        "seed": found.seed,
        "step": found.step,
        "recorded": None
        if found.num_recorded_steps is None
        else f"{found.num_recorded_steps} updates of the base",
        "checkpoints": checkpoints or None,
        "size": f"{found.size_bytes / 2**20:.2f} MiB",
    }
    for name, value in rows.items():
        if value is not None:
            console.print(f"  {name:<12}{value}")
    for when, values in (found.scores or {}).items():
        shown = ", ".join(
            f"{name} {values[name]:.4f}"
            for name in ("f1", "exact_match", "accuracy", "auc", "loss", "perplexity")
            if name in values
        )
        console.print(f"  {when:<12}{shown} on {values['num_rows']} test rows")
