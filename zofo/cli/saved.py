"""`zofo export`, `info`, `replay` and `verify`: convert and check the folders that runs wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zofo.cli.exits import EXIT_USER_ERROR, TrustRemoteCode, app, reports_errors
from zofo.cli.output import one_line
from zofo.console import plain_console, say

if TYPE_CHECKING:
    from zofo.saved.inspect import Info

Trained = Annotated[Path, typer.Argument(help="Run folder, artefact or checkpoint of a run.")]
Saved = Annotated[Path, typer.Argument(help="Run folder, artefact, checkpoint or export.")]
NewFolder = Annotated[Path, typer.Option("--to", help="Folder to write, new or empty.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: the dtype of the base.")
]
ShardSize = Annotated[str, typer.Option(help="Size limit of one safetensors file.")]


@app.command()
@reports_errors
def export(
    folder: Trained,
    to: NewFolder,
    dtype: Dtype = None,
    merge: Annotated[
        bool | None,
        typer.Option(
            help="Merge the adapter into the base, or not. Default: merge, unless the base is "
            "quantised, where a merge changes the model.",
        ),
    ] = None,
    max_shard_size: ShardSize = "5GB",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a trained model as a plain Hugging Face folder, and check its logits.

    zofo export runs/rotten-tomatoes-hybrid-lora --to plain --dtype bfloat16
    """
    from zofo.saved.export import export_model

    exported = export_model(
        folder,
        to,
        dtype=dtype,
        merge=merge,
        max_shard_size=max_shard_size,
        trust_remote_code=trust_remote_code,
    )
    console = plain_console(soft_wrap=True)
    size = f"{exported.size_bytes / 2**20:.1f} MiB, {exported.dtype}"
    parts = "one plain model" if exported.is_merged else "the base, and the adapter in adapter/"
    console.print(f"export    {exported.path} ({size}): {parts}")
    console.print(
        f"checked   logits on {exported.inputs} differ from the trained model's by at most "
        f"{exported.max_logit_difference:.2g} ({exported.tolerance:.2g} is allowed)"
    )
    if exported.is_changed:
        share = exported.max_logit_difference / exported.tolerance if exported.tolerance else 0.0
        console.print(
            f"merged    the adapter was rounded into the codes, which changed the logits by "
            f"{share:.1%} of the largest; leave --merge out for the exact model"
        )
    console.print(f"in Python {exported.usage}")


@app.command()
@reports_errors
def info(
    path: Saved,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a folder holds, whether it is complete, and which base it belongs to."""
    from zofo.saved.inspect import inspect

    found = inspect(path)
    if as_json:
        say(json.dumps(found.as_dict()))
    else:
        _show_info(found)


@app.command()
@reports_errors
def replay(
    path: Trained,
    step: Annotated[
        int, typer.Option("--step", help="Number of updates of the base; 0 gives the original.")
    ],
    to: NewFolder,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the base as it was after a number of updates, as a plain Hugging Face folder."""
    from zofo.console import replay_bar
    from zofo.saved.export import replay_base

    with replay_bar(plain_console(stderr=True)) as progress:
        exported = replay_base(
            path,
            to,
            step,
            dtype=dtype,
            max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    console = plain_console(soft_wrap=True)
    size = f"{exported.size_bytes / 2**20:.1f} MiB, {exported.dtype}"
    console.print(f"base      {exported.path} ({size}): after {step} updates, without adapter")
    console.print(f"in Python {exported.usage}")


@app.command()
@reports_errors
def verify(
    path: Saved,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Load a folder in steps, and print the check of each. If one fails, the exit code is 2."""
    from zofo.saved.verify import verify as checks_of

    console = plain_console(soft_wrap=True)
    is_sound = True
    for check in checks_of(path, trust_remote_code=trust_remote_code):
        word = {True: "ok", False: "FAILED", None: "-"}[check.is_sound]
        detail = " ".join(check.detail.splitlines())
        console.print(one_line(f"{check.name:<12}{word:<8}{detail}"))
        is_sound &= check.is_sound is True
    console.print(f"{path} is {'sound' if is_sound else 'NOT sound'}")
    if not is_sound:
        raise typer.Exit(EXIT_USER_ERROR)


def _show_info(found: Info) -> None:
    from zofo.results.answers import reward_text

    console = plain_console(soft_wrap=True)
    problem = " ".join((found.problem or "").splitlines())
    whole = "whole" if found.is_whole else f"NOT whole: {problem}"
    console.print(one_line(f"{found.path}: {found.kind}, {whole}"))
    checkpoints = ", ".join(
        f"{step}{'' if is_whole else ' (damaged)'}" for step, is_whole in found.checkpoints.items()
    )
    num = found.num_recorded_steps
    rows = {
        "method": found.method,
        "base": found.base,
        "fingerprint": found.base_fingerprint,
        "adapter": found.adapter,
        "task": found.task,
        "seed": found.seed,
        "step": found.step,
        "recorded": None if num is None else f"{num} updates of the base",
        "checkpoints": checkpoints or None,
        "note": found.note,
        "size": f"{found.size_bytes / 2**20:.2f} MiB",
    }
    for name, value in rows.items():
        if value is not None:
            console.print(one_line(f"  {name:<12}{value}"))
    for when, values in (found.scores or {}).items():
        shown = ", ".join(
            f"{name} {values[name]:.4f}"
            for name in ("f1", "exact_match", "accuracy", "auc", "loss", "perplexity")
            if values.get(name) is not None
        )
        console.print(one_line(f"  {when:<12}{shown} on {values['num_rows']} test rows"))
    for when, values in (found.rewards or {}).items():
        reward = reward_text(values.get("reward"))
        console.print(one_line(f"  {when:<12}reward {reward} on held-out prompts"))
