"""`zofo.json`: the description of an artefact, with a digest of every file.

    format, zofo_version            version of the format, and of the zofo that wrote it
    method, base, task, labels      what loading needs to know
    base_fingerprint                fingerprint of the base before training
    files                           name -> digest of every file that loading reads
    digest                          digest of all of the above

The digests detect damage and mixed-up files. They are not a signature, because anyone can write an
artefact with valid digests. Therefore the values are checked like any input, and the names in
`files` are compared with the folder but never opened. `trust_remote_code` is a wish, which only the
user can grant (`zofo.models.trust`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import pydantic
from torch import nn

from zofo.disk.files import file_digest, json_digest, read_json, refusing, write_json
from zofo.disk.folders import files_below
from zofo.errors import UserError
from zofo.models.loading import HEADS
from zofo.models.quantized import Quantization
from zofo.optim.methods import METHODS
from zofo.optim.trajectory import TRAJECTORY_FILE
from zofo.saved.layout import ARTIFACT_FOLDER, BUFFERS_FILE
from zofo.tasks.digests import ROWS_FILE
from zofo.tasks.spec import TaskSpec

FORMAT_VERSION: Final = 1
HEADER_FILE: Final = "zofo.json"
CARD_FILE: Final = "README.md"
ADAPTER_FOLDER: Final = "adapter"
MODEL_FOLDER: Final = "model"
SINGLE_FILES: Final = (TRAJECTORY_FILE, ROWS_FILE, BUFFERS_FILE)
"""Files beside the header that loading reads."""
_MAX_LABELS: Final = 1 << 16
_STRICT: Final = pydantic.ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class BaseSpec:
    """The base that training began with.

    Attributes:
        name: hub id, folder or alias.
        head: "causal-lm", "classification" or "seq2seq".
        dtype: dtype of the weights.
        num_labels: number of classes of a classification head.
        seed: seed of the initial weights of a new head.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: whether the base needs code from its repository.
        attn_implementation: as in transformers.
        quantization: "nf4", "fp4" or "int8", if bitsandbytes quantised the base at loading.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = _STRICT

    name: Annotated[str, pydantic.Field(max_length=1024)]
    head: Annotated[str, pydantic.Field(pattern=f"^({'|'.join(HEADS)})$")] = "causal-lm"
    dtype: str = "float32"
    num_labels: Annotated[int, pydantic.Field(ge=1, le=_MAX_LABELS)] = 2
    seed: Annotated[int, pydantic.Field(ge=0, lt=1 << 64)] = 0
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    quantization: Quantization | None = None

    def load(self, device: str = "cpu") -> tuple[nn.Module, Any]:
        """Load the base as it was before training, and its tokenizer.

        Args:
            device: where bitsandbytes puts a quantised base; any other is loaded on the CPU.
        """
        from zofo.models.loading import load_model

        return load_model(**vars(self), device=device)

    def tokenizer(self) -> Any:
        """Load the tokenizer alone."""
        from zofo.models.loading import load_tokenizer

        return load_tokenizer(
            self.name, revision=self.revision, trust_remote_code=self.trust_remote_code
        )

    def empty(self) -> nn.Module:
        """Build the base on torch's meta device, with shapes but without weights."""
        from zofo.models.loading import empty_model

        values = {k: v for k, v in vars(self).items() if k not in ("seed", "attn_implementation")}
        return empty_model(**values)


class _Manifest(pydantic.BaseModel):
    """The form of `zofo.json`."""

    model_config = _STRICT

    format: int
    zofo_version: str
    method: str
    base: BaseSpec
    base_fingerprint: str | None
    task: TaskSpec | None
    labels: Annotated[list[str], pydantic.Field(max_length=_MAX_LABELS)]
    files: dict[str, str]
    digest: str


def write_header(folder: Path, values: dict[str, Any]) -> None:
    """Write `zofo.json` for the files that lie in the folder now."""
    from zofo.version import __version__

    header = {
        "format": FORMAT_VERSION,
        "zofo_version": __version__,
        **values,
        "files": {name: file_digest(path) for name, path in _parts(folder).items()},
    }
    write_json(folder / HEADER_FILE, {**header, "digest": json_digest(header)})


def read_header(folder: Path) -> dict[str, Any]:
    """Read `zofo.json` and check it; `check_files` checks the other files.

    Raises:
        UserError: if it is damaged or has another version.
    """
    path = folder / HEADER_FILE
    header = read_json(path)
    with refusing(f"{path} is damaged", "copy the artefact again"):
        version, method = header["format"], header["method"]
        if version != FORMAT_VERSION or method not in METHODS:
            raise UserError(
                f"{path} has format {version!r:.40} and method {method!r:.40}; this zofo reads "
                f"format {FORMAT_VERSION}: install the zofo that wrote it"
            )
        if header["digest"] != json_digest({k: v for k, v in header.items() if k != "digest"}):
            raise ValueError("its digest differs from the recorded one")
        # In strict mode, pydantic makes a `BaseSpec` only from JSON text, not from a dict.
        _Manifest.model_validate_json(json.dumps(header))
    return dict(header)


def check_files(folder: Path, header: dict[str, Any]) -> None:
    """Compare the files of an artefact with the digests in its `zofo.json`.

    Raises:
        UserError: if a file is missing or altered, or does not belong to the artefact.
    """
    parts, digests = _parts(folder), header["files"]
    required = set(digests) | required_files(header["method"])
    missing, foreign = sorted(required - set(parts)), sorted(set(parts) - set(digests))
    if missing:
        raise UserError(f"{folder} lacks {missing[0]!r:.200}; copy the artefact again")
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]!r}, which does not belong to it; remove it")
    for name, path in parts.items():
        if file_digest(path) != digests[name]:
            raise UserError(f"{path} is damaged or belongs to another run; copy the artefact again")


def required_files(method: str) -> set[str]:
    """Names of the files that an artefact of a method must have."""
    names = set()
    if METHODS[method].needs_adapter:
        names |= {f"{ADAPTER_FOLDER}/adapter_{n}" for n in ("config.json", "model.safetensors")}
    if METHODS[method].base == "zeroth":
        names.add(TRAJECTORY_FILE)
    if METHODS[method].base == "first":
        names.add(f"{MODEL_FOLDER}/config.json")
    return names


def _parts(folder: Path) -> dict[str, Path]:
    """Name -> path of every file that loading may read; users may edit the model card."""
    first = (ADAPTER_FOLDER, MODEL_FOLDER)
    return {
        name: path
        for name, path in files_below(folder).items()
        if name in SINGLE_FILES or name.partition("/")[0] in first
    }


def find_artifact(folder: str | Path) -> Path:
    """The folder itself, or its subfolder `artifact/`, whichever is an artefact.

    Raises:
        UserError: if neither is.
    """
    folder = Path(folder).expanduser()
    for candidate in (folder, folder / ARTIFACT_FOLDER):
        if (candidate / HEADER_FILE).is_file():
            return candidate
    if not folder.exists():
        raise UserError(f"{folder} does not exist; give a run folder or an artefact of zofo")
    raise UserError(
        f"{folder} holds no {HEADER_FILE}, so it is neither a finished run nor an artefact"
    )
