"""Load a trained model in steps, each of which checks what it reads.

    files         The files of an artefact have the digests that its header records.
    history       The trajectory is readable and belongs to this base.
    base          The base loads as it was before training.
    adapter       The adapter belongs to the trajectory and fits the base.
    fingerprint   The base is the one that training began with.
    replay        The recorded updates apply to the base.
    buffers       The buffers that training has changed belong to the base.
    whole         The model that was saved as a whole loads.
    finite        Every weight is finite.

Loading, evaluation, export, replay and verification all run these steps. `zofo verify` therefore
finds every fault for which loading would fail. An assembly holds one model at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from zofo.disk.files import open_tensors, refusing
from zofo.disk.mapped import move_to_disk
from zofo.errors import UserError
from zofo.models.loading import load_model, resolve, weight_files
from zofo.models.saved_adapters import attach_adapter, check_adapter, load_adapter, names_in
from zofo.optim.blocks import is_peft, named_places, split_parameters
from zofo.optim.moved import mark_moved
from zofo.optim.trajectory import Trajectory, check_base
from zofo.perturb.quantized import Scales, is_quantized, unnest_scales
from zofo.saved.buffers import load_buffers
from zofo.saved.manifest import BaseSpec, check_files

STEPS: Final = (
    "files",
    "history",
    "base",
    "adapter",
    "fingerprint",
    "replay",
    "buffers",
    "whole",
    "finite",
)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Where the parts of a trained model lie; None for a part that it does not have."""

    folder: Path  # the folder that messages name
    base: BaseSpec | None = None  # the base before training; None if the caller has loaded it
    adapter: Path | None = None  # folder of the adapter
    trajectory: Path | None = None  # file with the updates of the base
    whole: Path | None = None  # folder of the model that was saved as a whole
    header: dict[str, Any] | None = None  # content of `zofo.json`, for an artefact


class Assembly:
    """A trained model while its parts are loaded.

    Each step is a method. It returns a sentence for `zofo verify`, or None if the parts do not need
    the step. It raises a `UserError` if a check fails.

    Args:
        parts: the parts to load.
        model: the base, if `parts` does not name it; the steps change it in place.
        stop: number of updates to replay; None for all.
        progress: called during the replay with the number of weights done and the total number.
        device: where bitsandbytes puts a quantised base; any other is loaded on the CPU.
        disk: a folder for temporary files that hold the replayed base; None: memory holds it.
    """

    def __init__(
        self,
        parts: Parts,
        model: nn.Module | None = None,
        *,
        stop: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        device: str = "cpu",
        disk: Path | None = None,
    ) -> None:
        self.parts, self._stop, self._progress = parts, stop, progress
        self._device, self._disk = device, disk
        self.model: Any = model  # the result of the steps so far
        self.tokenizer: Any = None
        self._trajectory: Trajectory | None = None
        self._record: dict[str, Any] = {}  # metadata of the trajectory

    def run(self, *names: str) -> Assembly:
        """Run the named steps; without names, all that the trained model needs."""
        # A model that was saved as a whole needs no base, so loading skips its replay.
        every = STEPS if self.parts.whole is None else ("files", "whole", "finite")
        for name in names or every:
            getattr(self, name)()
        self.model.eval()
        return self

    def files(self) -> str:
        """Compare the digests of an artefact; `open_source` compares those of a checkpoint."""
        if self.parts.header is not None:
            check_files(self.parts.folder, self.parts.header)
        return "every file has the recorded digest"

    def history(self) -> str | None:
        """Read the trajectory."""
        path, header = self.parts.trajectory, self.parts.header
        if path is None:
            return None
        self._trajectory, self._record = Trajectory.load(path)
        recorded = self._record.get("base_fingerprint")
        if header is not None and recorded != header["base_fingerprint"]:
            raise UserError(f"{path} belongs to another base; copy the artefact again")
        return f"{len(self._trajectory)} updates of the base, with the recorded digest"

    def base(self) -> str | None:
        """Load the base as it was before training."""
        spec = self.parts.base
        if spec is None or (self.parts.whole is not None and self._trajectory is None):
            return None
        with refusing(f"the base {spec.name!r} cannot be loaded", "check its name"):
            self.model, self.tokenizer = self._load(spec)
        return f"{spec.name} loads"

    def _load(self, spec: BaseSpec) -> tuple[nn.Module, Any]:
        """Load the base; if a folder for temporary files is given, the base stays in files."""
        stored = None if self._disk is None else _half_dtype_of(spec)
        if self._disk is None or stored is None or spec.dtype != "float32":
            return spec.load(self._device)
        # Its files are mapped in their own dtype only. The cast is done one weight at a time.
        model, tokenizer = dataclasses.replace(spec, dtype=stored).load(self._device)
        move_to_disk(model.parameters(), self._disk, torch.float32)
        return model.float(), tokenizer

    def adapter(self) -> str | None:
        """Attach the adapter, or load it into the one that the model has."""
        folder, trajectory = self.parts.adapter, self.parts.trajectory
        if folder is None:
            return None
        if is_peft(self.model):
            load_adapter(self.model, folder)
            return "the adapter's tensors were loaded"
        # In a checkpoint, the trajectory lies beside the adapter and records its digest. In an
        # artefact, `zofo.json` records the digests of both.
        header = None
        if trajectory is not None and trajectory.parent == folder:
            header = self._record
            for name in names_in(folder):
                check_adapter(folder, header, name)
        self.model = attach_adapter(self.model, folder, header)
        return f"{len(split_parameters(self.model).adapter)} tensors attached"

    def fingerprint(self) -> str | None:
        """Compare the fingerprint of the base with the recorded one."""
        self._unnest()
        record = self._record if self.parts.header is None else self.parts.header
        if self.model is None or not record:
            return None
        expected, name = record.get("base_fingerprint"), getattr(self.parts.base, "name", None)
        owner = str(self.parts.folder) + (f", of {name}," if name else "")
        check_base(split_parameters(self.model).base, expected, owner)
        return f"the base has the recorded fingerprint {expected}"

    def replay(self) -> str | None:
        """Apply the recorded updates to the base."""
        if self._trajectory is None:
            return None
        self._unnest()
        base = split_parameters(self.model).base
        if self._disk is not None:
            whole = (p for p in base.values() if not (is_quantized(p) or isinstance(p, Scales)))
            move_to_disk(whole, self._disk)
        self._trajectory.replay(base, stop=self._stop, progress=self._progress)
        mark_moved(self.model, has_moved=self._trajectory.moves_weights)
        return "every update was applied"

    def _unnest(self) -> None:
        """Let the scales of a quantised base move, as training did before it began."""
        if self._trajectory is not None and self.model is not None:
            unnest_scales(self.model)

    def buffers(self) -> str | None:
        """Set the buffers that training has changed. An earlier point of the run has no record."""
        at_end = self._trajectory is None or self._stop in (None, len(self._trajectory))
        if self.model is None or not at_end:
            return None
        # An artefact has the digest in its header, which `files` compares.
        record = self._record if self._record and self.parts.header is None else None
        num = load_buffers(self.parts.folder, self.model, record)
        return f"{num} buffers were set" if num else None

    def whole(self) -> str | None:
        """Load the model that was saved as a whole, in place of a replayed one."""
        folder, spec = self.parts.whole, self.parts.base
        if folder is None or spec is None:
            return None
        if self.model is not None:
            self.finite()
            self.model = None  # Frees the replayed model before the saved one is read.
        saved = dataclasses.replace(spec, name=str(folder), revision=None)
        with refusing(f"the model in {folder} cannot be loaded"):
            tokenizer = None if has_tokenizer(folder) else spec.tokenizer()
            self.model, self.tokenizer = load_model(**vars(saved), tokenizer=tokenizer)
        return f"{folder.name} loads"

    def finite(self) -> str:
        """Check that every weight is finite."""
        require_finite(self.model, self.parts.folder)
        return "every weight is finite"


def _half_dtype_of(spec: BaseSpec) -> str | None:
    """The dtype of a base whose files hold 16 bits; None for others, and for heads that may be new.

    The initial values of a new head depend on the dtype that it is made in.
    """
    if spec.head == "classification" or spec.quantization is not None:
        return None
    files = weight_files(resolve(spec.name), spec.revision)
    found = {tensor.dtype for tensor in open_tensors(*files)[0].values()} if files else set()
    names = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return names.get(found.pop()) if len(found) == 1 else None


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer was saved in the folder."""
    return (folder / "tokenizer_config.json").is_file()


def require_finite(model: nn.Module, owner: Path) -> None:
    """Raise a `UserError` that names the first weight with an infinity or NaN."""
    for name, parameter in named_places(model):
        if is_quantized(parameter):  # Codes are finite, whatever dtype they are stored in.
            continue
        if not bool(parameter.isfinite().all()):
            raise UserError(
                f"{owner}: the weight {name!r} is not finite; use an earlier checkpoint"
            )
