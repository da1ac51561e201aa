"""From the parts on disk to the trained model, one checked step after the other.

    files         the files of an artefact have the digests that its header records
    history       the trajectory is readable and belongs to this base
    base          the base loads as it was before training
    adapter       the adapter belongs to the trajectory and fits the base
    fingerprint   the base is the one that training began with
    replay        the recorded updates move the base
    whole         a model that was saved whole loads
    finite        every weight is finite

Whoever loads, evaluates, exports, replays or verifies runs these steps, so `zofo verify` finds what
loading would refuse. An assembly holds one model at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import nn

from zofo.disk.files import refusing
from zofo.errors import UserError
from zofo.models.adapters import attach_adapter, check_adapter
from zofo.models.loading import load_model
from zofo.optim.blocks import split_parameters
from zofo.optim.trajectory import Trajectory, check_base
from zofo.saved.manifest import BaseSpec, check_files

STEPS: Final = (
    "files",
    "history",
    "base",
    "adapter",
    "fingerprint",
    "replay",
    "whole",
    "finite",
)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a trained model consists of.

    Attributes:
        folder: where the parts lie, for messages.
        base: the base that training began with; None: the caller has loaded it.
        adapter: folder of the adapter.
        trajectory: file of the base's history.
        whole: folder of the whole model.
        header: of an artefact, as `zofo.json` says.
    """

    folder: Path
    base: BaseSpec | None = None
    adapter: Path | None = None
    trajectory: Path | None = None
    whole: Path | None = None
    header: dict[str, Any] | None = None


class Assembly:
    """A trained model while it is put together.

    Each step is a method that returns what it found, or None where the parts do not call for it,
    and raises a `UserError` where a check fails.

    Args:
        parts: what to put together.
        model: the base, where `parts` does not name it; changed in place.
        stop: updates to replay; None: all.
        progress: called during the replay with the numbers of weights done and to be done.

    Attributes:
        model: as far as the steps have come.
        tokenizer: its tokenizer.
    """

    def __init__(
        self,
        parts: Parts,
        model: nn.Module | None = None,
        *,
        stop: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.parts, self._stop, self._progress = parts, stop, progress
        self.model: Any = model
        self.tokenizer: Any = None
        self._trajectory: Trajectory | None = None
        self._record: dict[str, Any] = {}

    def run(self, *names: str) -> Assembly:
        """Take the named steps; without names those that lead to the trained model."""
        every = STEPS if self.parts.whole is None else ("files", "whole", "finite")
        for name in names or every:
            getattr(self, name)()
        self.model.eval()
        return self

    def files(self) -> str:
        """Compare digests; those of a checkpoint were compared when it was opened."""
        if self.parts.header is not None:
            check_files(self.parts.folder, self.parts.header)
        return "every digest holds"

    def history(self) -> str | None:
        """Read the trajectory."""
        path, header = self.parts.trajectory, self.parts.header
        if path is None:
            return None
        self._trajectory, self._record = Trajectory.load(path)
        recorded = self._record.get("base_fingerprint")
        if header is not None and recorded != header["base_fingerprint"]:
            raise UserError(f"{path} is of another base; copy the artefact again")
        return f"{len(self._trajectory)} updates of the base, digest holds"

    def base(self) -> str | None:
        """Load the base."""
        spec = self.parts.base
        if spec is None or (self.parts.whole is not None and self._trajectory is None):
            return None
        with refusing(f"the base {spec.name!r} cannot be loaded", "look at its name"):
            self.model, self.tokenizer = spec.load()
        return f"{spec.name} loads"

    def adapter(self) -> str | None:
        """Attach the adapter."""
        folder, trajectory = self.parts.adapter, self.parts.trajectory
        if folder is None:
            return None
        if trajectory is not None and trajectory.parent == folder:  # the layout of a checkpoint
            check_adapter(folder, self._record)
        self.model = attach_adapter(self.model, folder)
        return f"{len(split_parameters(self.model).adapter)} tensors attached"

    def fingerprint(self) -> str | None:
        """Compare the base with the one on record."""
        record = self._record if self.parts.header is None else self.parts.header
        if self.model is None or not record:
            return None
        expected, name = record.get("base_fingerprint"), getattr(self.parts.base, "name", None)
        owner = str(self.parts.folder) + (f", of {name}," if name else "")
        check_base(split_parameters(self.model).base, expected, owner)
        return f"{expected} is that of the base"

    def replay(self) -> str | None:
        """Move the base to where training left it."""
        if self._trajectory is None:
            return None
        base = split_parameters(self.model).base
        self._trajectory.replay(base, stop=self._stop, progress=self._progress)
        return "every update applies"

    def whole(self) -> str | None:
        """Load the model that was saved whole, in place of one that was replayed."""
        folder, spec = self.parts.whole, self.parts.base
        if folder is None or spec is None:
            return None
        if self.model is not None:
            self.finite()
            self.model = None  # one model at a time
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        saved = dataclasses.replace(spec, name=str(folder), revision=None)
        with refusing(f"the model in {folder} cannot be loaded"):
            tokenizer = None if has_tokenizer else spec.tokenizer()
            self.model, self.tokenizer = load_model(**vars(saved), tokenizer=tokenizer)
        return f"{folder.name} loads"

    def finite(self) -> str:
        """Look at every weight."""
        require_finite(self.model, self.parts.folder)
        return "every weight is finite"


def require_finite(model: nn.Module, owner: Path) -> None:
    """Refuse a model with a weight that is infinite or not a number.

    Raises:
        UserError: which names the weight and the folder.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(
                f"{owner}: the weight {name!r} is not finite; use an earlier checkpoint"
            )
