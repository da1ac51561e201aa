"""The model card of an artefact: README.md, as the Hugging Face hub reads it.

It states the base, the method and the data, the test scores with their confidence intervals, the
cost, and how to load the model. It never names local files, because the card may be published.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from zofo.disk.files import write_text
from zofo.disk.yaml import yaml_text
from zofo.environment import environment
from zofo.models.loading import HEAD_NAMES
from zofo.optim.methods import METHODS
from zofo.results.answers import TIMES, reward_text
from zofo.saved.hub import looks_like_hub_id, public_name
from zofo.saved.manifest import CARD_FILE, BaseSpec
from zofo.tasks.families.table import BUILTIN

_SCORES: Final = ("f1", "exact_match", "accuracy", "auc", "loss", "perplexity")
LOCAL_MODEL: Final = "a local model"
_PACKAGES: Final = ("zofo", "torch", "transformers", "peft")


def write_card(
    folder: Path,
    *,
    base: BaseSpec,
    task: Mapping[str, Any],
    num_rows: Mapping[str, int],
    summary: Mapping[str, Any],
) -> Path:
    """Write the model card of an artefact; `summary` is the content of `result.json`."""
    method, adapter = summary["method"], summary["adapter"]
    tags = ["zofo", method, *([adapter] if adapter != "none" else [])]
    if METHODS[method].zeroth:
        tags.append("zeroth-order")
    values = {
        "base_model": public_name(base.name),
        "library_name": "zofo",
        "pipeline_tag": HEAD_NAMES[base.head][1],
        "tags": tags,
        "datasets": _datasets(task),
    }
    write_text(folder / CARD_FILE, front_matter(values) + _body(base, task, num_rows, summary))
    return folder / CARD_FILE


def front_matter(values: Mapping[str, Any]) -> str:
    """The YAML block at the beginning of a model card, without the keys that have no value."""
    known = {key: value for key, value in values.items() if value}
    return f"---\n{yaml_text(known)}---\n\n"


def _body(
    base: BaseSpec,
    task: Mapping[str, Any],
    num_rows: Mapping[str, int],
    summary: Mapping[str, Any],
) -> str:
    method, cost = summary["method"], summary["cost"]
    name = public_name(base.name) or LOCAL_MODEL
    data = ", ".join(_datasets(task) or [])
    facts = {
        "base": ", ".join(filter(None, (name, base.dtype, base.quantization))),
        "method": f"{method}: {METHODS[method].description}",
        "adapter": summary["adapter"],
        "task": task["name"] + (f" ({data})" if data else ""),
        "rows": ", ".join(f"{num} {part}" for part, num in num_rows.items()),
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
            *_scores(num_rows["test"], summary.get("test")),
            *_rewards(summary.get("rewards")),
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
            "Digests in `zofo.json` detect damaged files and another base.",
            "",
            "Written with " + ", ".join(f"{p} {versions[p]}" for p in _PACKAGES) + ".",
            "",
        ]
    )


def _warning(method: str) -> list[str]:
    orders = METHODS[method]
    if orders.base == "zeroth":
        return [
            "**Do not use plain `peft` or `transformers`.** Training moved every weight of the "
            "base. `base_trajectory.safetensors` records the updates, and `zofo.load` applies them "
            "to the original base. "
            + (
                "`PeftModel.from_pretrained` would attach the adapter to the original base, with "
                "which it was not trained."
                if orders.needs_adapter
                else "The original base alone is the untrained model."
            ),
            "",
        ]
    if orders.base == "first":
        return ["Plain `transformers` can also read the whole model in `model/`.", ""]
    return ["Training left the base as it was. Plain `peft` can also read `adapter/`.", ""]


def _scores(num_rows: int, scores: Mapping[str, Any] | None) -> list[str]:
    if scores is None:  # A study scores the test rows later, and only for the runs that it selects.
        return []
    before, after = scores["before"], scores["after"]

    def shown(values: Mapping[str, float], key: str) -> str:
        low, high = values.get(f"{key}_low"), values.get(f"{key}_high")
        interval = "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"
        return f"{values[key]:.4f}{interval}"

    lines: list[tuple[str, ...]] = [
        (key, shown(before, key), shown(after, key)) for key in _SCORES if key in after
    ]
    if "majority" in after:
        lines.append(("share of the most frequent class", *[f"{after['majority']:.4f}"] * 2))
    return [
        f"## Scores on {num_rows} held-out test rows",
        "Brackets hold 95% confidence intervals.",
        "",
        _table(("", "before", "after"), lines),
    ]


def _rewards(rewards: Mapping[str, Any] | None) -> list[str]:
    if not rewards:
        return []
    shown = [reward_text(rewards[when].get("reward")) for when in TIMES]
    return ["## Reward on held-out prompts", _table(("", *TIMES), [("mean reward", *shown)])]


def _table(header: tuple[str, ...], rows: Any) -> str:
    def cell(value: Any) -> str:  # Line breaks and bars would break the table.
        return " ".join(str(value).split()).replace("|", "\\|")

    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in lines) + "\n"


def _datasets(task: Mapping[str, Any]) -> list[str] | None:
    """Hub ids of the data; None if they are unknown or the data are local."""
    if task["name"] in BUILTIN:
        known = BUILTIN[task["name"]]
        return [known.hub.dataset] if known.embedded is None else None
    train = task.get("train") or ""
    return [train] if looks_like_hub_id(train) and not Path(train).exists() else None
