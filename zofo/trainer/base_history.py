"""What a checkpoint holds of a model whose base moves, and the way back to it.

    adapter_model.safetensors       peft's own
    prompt_encoder.safetensors      the encoder's parameters, of prompt learning only
    base_trajectory.safetensors     the base, as the updates that lead to it from the original

The trained base itself is not in it. To go to a checkpoint is to start from the original base and
replay. Within one run the base has moved on, so going back needs the original: the user's, or a
copy that is written when training begins and removed when it has ended.

A run may also keep a newer copy of the moved base (`BaseSnapshot`), to shorten the replay.

`PeftModel.from_pretrained` would join the adapter to a base that it was not trained with. A mark in
adapter_config.json makes it warn; `load_checkpoint` does what is meant.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zofo.disk.files import fingerprint, open_tensors, write_json, write_tensors
from zofo.errors import UserError
from zofo.models.adapters import adapter_digests, adapter_folder, is_peft
from zofo.optim.blocks import split_parameters
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory, check_base
from zofo.saved.layout import ORIGINAL_BASE_FILE, SNAPSHOT_FILE

MARK = "zofo_load_with"
"""Key in adapter_config.json, which peft does not know and warns of."""


class BaseHistory:
    """Where the base of one model came from and has got to.

    A model without peft is saved whole, so its weights need no replay; only the record continues.

    Args:
        model: the model.
        optimizer: what moves the base and records how.
        folder: where the copy of the original goes.
        original: returns the original base, name -> tensor; None: copy it when told to.
        snapshot_every: updates between copies of the moved base; None: none.
    """

    def __init__(
        self,
        model: Any,
        optimizer: HybridOptimizer,
        folder: Path,
        original: Callable[[], Mapping[str, Tensor]] | None = None,
        snapshot_every: int | None = None,
    ) -> None:
        self.model, self.optimizer, self.original = model, optimizer, original
        self.base = split_parameters(model).base
        self.fingerprint: str | None = fingerprint(self.base)
        self._file = folder / ORIGINAL_BASE_FILE
        self._num_updates_in_copy: int | None = None
        self._snapshot = BaseSnapshot(folder, snapshot_every)

    def keep_original(self) -> None:
        """Write the copy that going back needs, unless it is there or not needed."""
        if is_peft(self.model) and self.original is None and self._num_updates_in_copy is None:
            copied = {name: p.detach().cpu().contiguous() for name, p in self.base.items()}
            write_tensors(self._file, copied, {})
            self._num_updates_in_copy = len(self.optimizer.trajectory)

    def take_snapshot(self) -> None:
        """Copy the base as it is now, if that is due."""
        if is_peft(self.model):
            self._snapshot.write_if_due(self.base, self.optimizer.trajectory, self.fingerprint)

    def drop_copies(self) -> None:
        """Remove the copies of the base."""
        self._snapshot.drop()
        if self._num_updates_in_copy is not None:
            self._file.unlink(missing_ok=True)
            self._num_updates_in_copy = None

    def save(self, folder: Path) -> None:
        """Mark the adapter as not enough, and write the trajectory that belongs to it."""
        digests: dict[str, str] = {}
        for name in getattr(self.model, "peft_config", {}):
            path = adapter_folder(folder, name) / "adapter_config.json"
            if not path.exists():
                continue
            config = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, {**config, MARK: "zofo.load_checkpoint(base, folder)"})
            digests |= adapter_digests(folder, name)
        self.optimizer.trajectory.save(
            folder / TRAJECTORY_FILE, base_fingerprint=self.fingerprint, files=digests
        )

    def go_to(self, folder: Path) -> None:
        """Bring the base to where the trajectory in a checkpoint ends.

        Raises:
            UserError: if the checkpoint is of another run or base, or the original is needed and
                not at hand.
        """
        target, header = Trajectory.load(folder / TRAJECTORY_FILE)
        present = self.optimizer.trajectory
        for key in ("seed", "distribution", "groups"):
            if getattr(target, key) != getattr(present, key):
                raise UserError(
                    f"{folder} was trained with another {key} of the base; resume with the options "
                    "of the saved run"
                )
        if is_peft(self.model):
            start = self._restore_original() if len(present) else 0
            if target.updates[:start] != present.updates[:start]:
                raise UserError(f"{folder} belongs to another run than this trainer's base")
            if not start:
                original = header.get("base_fingerprint")
                check_base(self.base, original, str(folder))
                start = self._snapshot.restore(self.base, target, original)
            target.replay(self.base, start=start)
        self.fingerprint = header.get("base_fingerprint")
        self.optimizer.trajectory = target

    def _restore_original(self) -> int:
        """Put the original back; returns how many updates it contains."""
        if self.original is not None:
            values, num_updates = self.original(), 0
        elif self._num_updates_in_copy is not None:
            values, num_updates = open_tensors(self._file)[0], self._num_updates_in_copy
        else:
            raise UserError(
                "this trainer's base has moved since the checkpoint; make a new trainer on the "
                "base that the run began with, or pass original_base"
            )
        for name, parameter in self.base.items():
            parameter.data.copy_(values[name])
        if not num_updates:
            check_base(self.base, self.fingerprint, "this model")
        return num_updates


class BaseSnapshot:
    """The newest copy of a run's base, so that resuming replays only the end of the trajectory.

    One file in the run folder, as large as the base, replaced every so many steps and removed when
    training has ended. It says which updates it contains. If it is damaged or does not belong to
    the checkpoint, the whole trajectory is replayed instead.

    Args:
        folder: the run folder.
        every: updates between copies; None: write none.
    """

    def __init__(self, folder: Path, every: int | None) -> None:
        self.path, self.every = folder / SNAPSHOT_FILE, every
        self.num_updates = 0

    def write_if_due(
        self, base: Mapping[str, Tensor], trajectory: Trajectory, base_fingerprint: str | None
    ) -> None:
        """Copy the base if `every` updates have gone by since the last copy.

        Raises:
            UserError: if the file cannot be written.
        """
        if self.every is None or len(trajectory) - self.num_updates < self.every:
            return
        values = {name: p.detach().cpu().contiguous() for name, p in base.items()}
        about = {
            "num_updates": str(len(trajectory)),
            "updates": _digest(trajectory, len(trajectory)),
            "base_fingerprint": str(base_fingerprint),
            "content": fingerprint(values),
        }
        write_tensors(self.path, values, about)
        self.num_updates = len(trajectory)

    def restore(
        self,
        base: Mapping[str, nn.Parameter],
        trajectory: Trajectory,
        base_fingerprint: str | None,
    ) -> int:
        """Bring the base to the copy if it lies on the trajectory.

        Returns:
            How many updates the base now contains: 0 if there is no such copy.
        """
        if not self.path.exists():
            return 0
        try:
            values, about = open_tensors(self.path)
            num_updates = int(about["num_updates"])
            is_sound = about["content"] == fingerprint(values)
        except (UserError, KeyError, ValueError) as error:
            warnings.warn(f"{self.path} is passed over: {error}", stacklevel=2)
            return 0
        if not is_sound:
            warnings.warn(f"{self.path} is passed over: its digest does not fit", stacklevel=2)
            return 0
        belongs = (
            0 < num_updates <= len(trajectory)
            and about.get("base_fingerprint") == str(base_fingerprint)
            and about.get("updates") == _digest(trajectory, num_updates)
            and values.keys() == base.keys()
        )
        if not belongs:
            return 0
        for name, parameter in base.items():
            parameter.data.copy_(values[name])
        self.num_updates = num_updates
        return num_updates

    def drop(self) -> None:
        """Remove the copy."""
        self.path.unlink(missing_ok=True)
        self.num_updates = 0


def _digest(trajectory: Trajectory, num_updates: int) -> str:
    """Of the first updates and what turns them into weights.

    It hashes the `repr` of GroupSpec and Update, which therefore keep their names and fields:
    a copy that another version wrote would otherwise no longer be recognised.
    """
    parts = (trajectory.seed, trajectory.distribution, trajectory.groups)
    text = repr((parts, trajectory.updates[:num_updates]))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
