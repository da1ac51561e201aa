"""What an exported folder says of itself: a record for `zofo info`, and a card for people.

Both may travel to a hub, so names of local files stay out of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from zofo.disk.files import write_json, write_text
from zofo.models.embedded import ALIASES
from zofo.models.loading import HEAD_NAMES
from zofo.saved.hub import looks_like_hub_id
from zofo.saved.manifest import ADAPTER_FOLDER, CARD_FILE
from zofo.saved.source import Source

EXPORT_FILE: Final = "zofo_export.json"
"""What the folder was made from; no loader reads it."""
_LOCAL: Final = "a local model"


@dataclass(frozen=True)
class Exported:
    """What an export came to.

    Attributes:
        path: the folder.
        is_merged: whether the base alone is the whole model.
        dtype: of the weights.
        max_logit_difference: between the folder and the trained model, on `inputs`.
        tolerance: what it had to stay under.
        inputs: what was compared, in words.
        usage: a line of Python that loads the folder without zofo.
    """

    path: Path
    is_merged: bool
    dtype: str
    max_logit_difference: float
    tolerance: float
    inputs: str
    usage: str

    @property
    def size_bytes(self) -> int:
        """Of the folder."""
        return sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())


def usage(folder: Path, head: str, *, is_merged: bool) -> str:
    """A line of Python that loads an export without zofo."""
    kind = HEAD_NAMES[head][0]
    load = f"{kind}.from_pretrained({str(folder)!r})"
    if is_merged:
        return f"from transformers import {kind}; model = {load}"
    return (
        f"from transformers import {kind}; from peft import PeftModel; "
        f"model = PeftModel.from_pretrained({load}, {str(folder / ADAPTER_FOLDER)!r})"
    )


def describe(exported: Exported, source: Source, step: int | None, folder: Path) -> None:
    """Write the record and the card.

    Args:
        exported: what was written.
        source: where it is from.
        step: of the base, if that was written instead of the trained model.
        folder: where to.
    """
    from zofo.version import __version__

    name = source.base.name
    is_on_hub = looks_like_hub_id(name) and not Path(name).exists()
    origin = ALIASES[name].origin if name in ALIASES else name if is_on_hub else None
    record = {
        "format": 1,
        "zofo_version": __version__,
        "method": source.method,
        "base": origin or _LOCAL,
        "head": source.base.head,
        "task": (source.task or {}).get("name"),
        "labels": list(source.labels),
        "step": step,
        "dtype": exported.dtype,
        "is_merged": exported.is_merged,
        "max_logit_difference": exported.max_logit_difference,
        "tolerance": exported.tolerance,
        "compared_on": exported.inputs,
    }
    write_json(folder / EXPORT_FILE, record)
    write_text(folder / CARD_FILE, _card(exported, source, step, origin))


def _card(exported: Exported, source: Source, step: int | None, origin: str | None) -> str:
    front: dict[str, Any] = {
        "base_model": origin,
        "library_name": "transformers",
        "pipeline_tag": HEAD_NAMES[source.base.head][1],
        "tags": ["zofo", source.method],
    }
    known = {key: value for key, value in front.items() if value}
    task = (source.task or {}).get("name")
    title, compared = f"{origin or _LOCAL}, fine-tuned", "the trained model"
    if task:
        title += f" on {task}"
    if step is not None:
        title = f"The base of a fine-tuned {origin or 'model'} after {step} updates, no adapter"
        compared = "the base in memory"
    parts = (
        "The adapter is merged into the weights, or there is none; nothing else is needed."
        if exported.is_merged
        else f"The adapter lies in `{ADAPTER_FOLDER}/` and belongs to this base alone."
    )
    # The folder will not stay where it was written.
    code = usage(Path("this folder"), source.base.head, is_merged=exported.is_merged)
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(known, sort_keys=False)}---\n",
            f"# {title}\n",
            f"By zofo, method {source.method}, weights in {exported.dtype}. {parts}\n",
            "```python",
            *code.split("; "),
            "```\n",
            f"Compared with {compared} on {exported.inputs}: logits differ by at most "
            f"{exported.max_logit_difference:.3g} ({exported.tolerance:.3g} was allowed).\n",
        ]
    )
