"""`zofo export`, `info`, `replay` and `verify`: what a run leaves, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from zofo.export import Exported, export_model


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
