"""The model card of an artefact: README.md, as the Hugging Face hub reads it.

It says what was trained on what, how well it does with the interval that the number of test rows
leaves, what that cost, and how to load it. Names of local files stay out of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from zofo.disk.files import write_text
from zofo.environment import environment
from zofo.models.embedded import ALIASES
from zofo.models.loading import HEAD_NAMES
from zofo.optim.methods import METHODS
from zofo.saved.hub import looks_like_hub_id
from zofo.saved.manifest import CARD_FILE, BaseSpec
from zofo.tasks.families.table import BUILTIN

_SCORES: Final = ("f1", "exact_match", "accuracy", "auc", "loss", "perplexity")
_PACKAGES: Final = ("zofo", "torch", "transformers", "peft")


def write_card(
    folder: Path,
    *,
    base: BaseSpec,
    task: Mapping[str, Any],
    num_rows: Mapping[str, int],
    summary: Mapping[str, Any],
) -> Path:
    """Write the card of an artefact.

    Args:
        folder: the artefact.
        base: what it was trained from.
        task: the task's options.
        num_rows: part of the data -> rows.
        summary: what `result.json` says.
    """
    text = _front_matter(base, task, summary) + _body(base, task, num_rows, summary)
    write_text(folder / CARD_FILE, text)
    return folder / CARD_FILE


def _front_matter(base: BaseSpec, task: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    method, adapter = summary["method"], summary["adapter"]
    tags = ["zofo", method, *([adapter] if adapter != "none" else [])]
    if METHODS[method].zeroth:
        tags.append("zeroth-order")
    values: dict[str, Any] = {
        "base_model": _public_name(base.name),
        "library_name": "zofo",
        "pipeline_tag": HEAD_NAMES[base.head][1],
        "tags": tags,
        "datasets": _datasets(task),
    }
    known = {key: value for key, value in values.items() if value}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---\n\n"


def _body(
    base: BaseSpec,
    task: Mapping[str, Any],
    num_rows: Mapping[str, int],
    summary: Mapping[str, Any],
) -> str:
    method, cost = summary["method"], summary["cost"]
    name = _public_name(base.name) or "a local model"
    data = ", ".join(_datasets(task) or [])
    rows = ", ".join(f"{num} {part}" for part, num in num_rows.items())
    facts = {
        "base": f"{name}, {base.dtype}",
        "method": f"{method}: {METHODS[method].description}",
        "adapter": summary["adapter"],
        "task": task["name"] + (f" ({data})" if data else ""),
        "rows": rows,
        "seed": summary["seed"],
    }
    costs = {
        "steps": cost["steps"],
        "forward-equivalents (forwards of one micro-batch)": cost["forward_equivalents"],
        "seconds of training": f"{cost['train_s']:.0f}",
        "peak memory": f"{cost['peak_memory_bytes'] / 2**30:.2f} GiB",
        "size of these files": f"{cost['artifact_bytes'] / 2**20:.2f} MiB",
    }
    versions = environment()["packages"]
    return "\n".join(
        [
            f"# {name}, fine-tuned on {task['name']}",
            "",
            _table(("", ""), facts.items()),
            *_test(num_rows["test"], summary.get("test")),
            "## What it cost",
            _table(("", ""), costs.items()),
            "## How to load it",
            "```python",
            "import zofo",
            "",
            'trained = zofo.load("this folder, or the hub id of this repository")',
            "trained.model, trained.tokenizer",
            "```",
            "",
            *_warning(method),
            "`zofo.json` holds a digest of every file: damaged files and another base are refused.",
            "",
            "Written with " + ", ".join(f"{p} {versions[p]}" for p in _PACKAGES) + ".",
            "",
        ]
    )


def _test(num_rows: int, scores: Mapping[str, Any] | None) -> list[str]:
    """A study measures the test rows after training, of the runs that it chooses."""
    if scores is None:
        return []
    return [
        f"## Scores on {num_rows} held-out test rows",
        "With 95% intervals where they are known.",
        "",
        _scores(scores["before"], scores["after"]),
    ]


def _warning(method: str) -> list[str]:
    orders = METHODS[method]
    if orders.base == "zeroth":
        return [
            "**Do not use plain `peft` or `transformers`.** Training moved every weight of the "
            "base. How it moved is in `base_trajectory.safetensors`, from which `zofo.load` "
            "regenerates the trained base on the original one. "
            + (
                "`PeftModel.from_pretrained` would join the adapter to a base that it was not "
                "trained with."
                if orders.needs_adapter
                else "The original base alone is the untrained model."
            ),
            "",
        ]
    if orders.base == "first":
        return ["The whole model is in `model/`, which plain `transformers` reads too.", ""]
    return ["The base did not move; plain `peft` reads the adapter in `adapter/` too.", ""]


def _scores(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    def shown(values: Mapping[str, float], key: str) -> str:
        low, high = values.get(f"{key}_low"), values.get(f"{key}_high")
        interval = "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"
        return f"{values[key]:.4f}{interval}"

    lines: list[tuple[str, ...]] = [
        (key, shown(before, key), shown(after, key)) for key in _SCORES if key in after
    ]
    if "majority" in after:
        lines.append(("share of the commonest class", *[f"{after['majority']:.4f}"] * 2))
    return _table(("", "before", "after"), lines)


def _table(header: tuple[str, ...], rows: Any) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in lines) + "\n"


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _public_name(name: str) -> str | None:
    """The hub id of a model; None for a local folder."""
    if name in ALIASES:
        return ALIASES[name].origin
    return name if looks_like_hub_id(name) and not Path(name).exists() else None


def _datasets(task: Mapping[str, Any]) -> list[str] | None:
    """Hub ids of the data, where they are known."""
    if task["name"] in BUILTIN:
        known = BUILTIN[task["name"]]
        return [known.hub.dataset] if known.embedded is None else None
    train = task.get("train") or ""
    return [train] if looks_like_hub_id(train) and not Path(train).exists() else None
