"""The files that describe an exported folder: a record for `zofo info`, and a model card.

Neither names local files, because the folder may be published.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import pydantic

from zofo.disk.files import read_json, refusing, write_json, write_text
from zofo.models.loading import HEAD_NAMES, HEADS
from zofo.saved.card import LOCAL_MODEL, front_matter
from zofo.saved.hub import public_name
from zofo.saved.manifest import ADAPTER_FOLDER, CARD_FILE
from zofo.saved.source import Source

EXPORT_FILE: Final = "zofo_export.json"
"""The record of the export. Loaders ignore it."""
_FORMAT: Final = 2  # Format 1 has no digests of the files beside it.


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        path: the folder.
        is_merged: whether the folder needs no separate adapter.
        dtype: dtype of the weights.
        max_logit_difference: largest difference between the logits of the folder and those of the
            trained model on `inputs`.
        tolerance: the largest difference that was allowed.
        inputs: description of the inputs that were compared.
        usage: a line of Python that loads the folder without zofo.
        is_changed: whether the merge has rounded the adapter into the codes of a quantised base.
    """

    path: Path
    is_merged: bool
    dtype: str
    max_logit_difference: float
    tolerance: float
    inputs: str
    usage: str
    is_changed: bool = False

    @property
    def size_bytes(self) -> int:
        """Size of the folder."""
        return sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())


class Record(pydantic.BaseModel):
    """What `zofo_export.json` says that reading an export needs."""

    model_config = pydantic.ConfigDict(extra="ignore", strict=True)

    format: int
    method: str
    base: str
    head: Annotated[str, pydantic.Field(pattern=f"^({'|'.join(HEADS)})$")]
    task: str | None
    step: int | None
    is_merged: bool

    @property
    def has_digests(self) -> bool:
        """Whether a list with digests of all files belongs to the export."""
        return self.format >= _FORMAT


def read_record(folder: Path) -> Record:
    """Read the record of an export.

    Raises:
        UserError: if it is damaged.
    """
    values = read_json(folder / EXPORT_FILE)
    with refusing(f"{folder / EXPORT_FILE} is damaged", "export again"):
        return Record.model_validate_json(json.dumps(values))


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
    """Write the record and the model card.

    Args:
        exported: the result of the export.
        source: the trained model that was exported.
        step: the step of the base, if the base alone was exported.
        folder: the folder that gets both files.
    """
    from zofo.version import __version__

    origin = public_name(source.base.name)
    record = {
        "format": _FORMAT,
        "zofo_version": __version__,
        "method": source.method,
        "base": origin or LOCAL_MODEL,
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
    front = {
        "base_model": origin,
        "library_name": "transformers",
        "pipeline_tag": HEAD_NAMES[source.base.head][1],
        "tags": ["zofo", source.method],
    }
    task = (source.task or {}).get("name")
    title, compared = f"{origin or LOCAL_MODEL}, fine-tuned", "the trained model"
    if task:
        title += f" on {task}"
    if step is not None:
        title = f"The base of a fine-tuned {origin or 'model'} after {step} updates, no adapter"
        compared = "the base in memory"
    parts = (
        "These weights are the whole model; an adapter, if there was one, is merged into them."
        if exported.is_merged
        else f"The adapter lies in `{ADAPTER_FOLDER}/` and belongs to this base alone."
    )
    # The card names no path, because the folder may be moved.
    code = usage(Path("this folder"), source.base.head, is_merged=exported.is_merged)
    return "\n".join(
        [
            f"{front_matter(front)}# {title}\n",
            f"By zofo, method {source.method}, weights in {exported.dtype}. {parts}\n",
            "```python",
            *code.split("; "),
            "```\n",
            f"Compared with {compared} on {exported.inputs}: logits differ by at most "
            f"{exported.max_logit_difference:.3g} ({exported.tolerance:.3g} was allowed)."
            + (" The merge rounded the adapter into the codes." if exported.is_changed else "")
            + "\n",
        ]
    )
