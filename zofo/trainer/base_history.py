"""Save the moved base of a model in a checkpoint, and restore it.

A checkpoint (`zofo.saved.checkpoint`) does not hold the trained base itself. Restoring starts from
the original base and replays the trajectory. Within one run the base has already changed, so the
original must be at hand: it comes from the user, or from a copy that exists only during training. A
run may also write newer copies of the moved base (`BaseSnapshot`), which shorten the replay.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zofo.disk.files import fingerprint, open_tensors, remove_file, write_tensors
from zofo.errors import UserError
from zofo.optim.blocks import is_peft, split_parameters
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory, check_base
from zofo.perturb.shards import sharded_as
from zofo.saved.layout import ORIGINAL_BASE_FILE, SNAPSHOT_FILE


class BaseHistory:
    """The original base of one model, its updates so far, and its copies on disk.

    A model without peft is saved whole. Its weights need no replay, and only the record continues.

    Args:
        model: the model.
        optimizer: the optimizer that updates the base and records the trajectory.
        folder: folder of the copies.
        original: returns the original base, name -> tensor; None: `keep_original` writes a copy.
        snapshot_every: updates between snapshots of the moved base; None: no snapshots.
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
        self.optimizer.original_fingerprint()
        self._file = folder / ORIGINAL_BASE_FILE
        self._num_updates_in_copy: int | None = None  # None while there is no copy
        self._snapshot = BaseSnapshot(folder, snapshot_every)

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the base before training."""
        return self.optimizer.base_fingerprint

    @property
    def _is_first(self) -> bool:
        """Whether this process writes the copies, of several with the same folder."""
        processes = self.optimizer.processes
        return processes is None or processes.rank == 0

    def _wait(self) -> None:
        if self.optimizer.processes is not None:
            self.optimizer.processes.wait()

    def keep_original(self) -> None:
        """Write a copy of the base for later restores, unless there is a source already."""
        if is_peft(self.model) and self.original is None and self._num_updates_in_copy is None:
            if self._is_first:
                write_tensors(self._file, _on_cpu(self.base), {})
            self._wait()
            self._num_updates_in_copy = len(self.optimizer.trajectory)

    def take_snapshot(self) -> None:
        """Write a snapshot of the base if one is due."""
        if is_peft(self.model):
            self._snapshot.write_if_due(self.base, self.optimizer.trajectory, self.fingerprint)

    def drop_copies(self) -> None:
        """Remove all copies of the base."""
        self._wait()  # Another process may still read them.
        if self._is_first:
            self._snapshot.drop()
            if self._num_updates_in_copy is not None:
                remove_file(self._file, is_needed=False)
        self._num_updates_in_copy = None

    def go_to(self, folder: Path) -> None:
        """Set the base to the end of the trajectory in a checkpoint.

        Raises:
            UserError: if the checkpoint belongs to another run or base, or if the original is
                needed and not available.
        """
        target, header = Trajectory.load(folder / TRAJECTORY_FILE)
        present = self.optimizer.trajectory
        for key in ("seed", "distribution", "groups", "eps", "estimator"):
            if getattr(target, key) != getattr(present, key):
                raise UserError(
                    f"{folder} was trained with another {key} of the base; resume with the options "
                    "of the saved run"
                )
        if is_peft(self.model):
            start = self._restore_original() if len(present) else 0
            if target.updates[:start] != present.updates[:start]:
                raise UserError(f"{folder} belongs to another run than this trainer's base")
            if not start:  # The base is now the original, so a snapshot can shorten the replay.
                original = header.get("base_fingerprint")
                check_base(self.base, original, str(folder))
                start = self._snapshot.restore(self.base, target, original)
            target.replay(self.base, start=start, original=self.optimizer.original)
        elif self.optimizer.original is not None:
            check_base(self.optimizer.original, header.get("base_fingerprint"), str(folder))
        self.optimizer.base_fingerprint = header.get("base_fingerprint")
        self.optimizer.trajectory = target

    def _restore_original(self) -> int:
        """Restore the original or its copy; return the number of updates that the base contains."""
        if self.original is not None:
            values, num_updates = self.original(), 0
        elif self._num_updates_in_copy is not None:
            values, num_updates = open_tensors(self._file)[0], self._num_updates_in_copy
        else:
            raise UserError(
                "this trainer's base has moved since the checkpoint; make a new trainer on the "
                "base that the run began with, or pass original_base"
            )
        _copy_into(self.base, values)
        if not num_updates:  # The recorded fingerprint is that of the base without updates.
            check_base(self.base, self.fingerprint, "this model")
        return num_updates


class BaseSnapshot:
    """The newest copy of a moved base, so that a resumed run replays only the last updates.

    It is one file in the run folder, as large as the base. It is replaced every `every` updates and
    removed when training has ended, and it records which updates it contains. If it is damaged or
    does not belong to the checkpoint, the whole trajectory is replayed instead.

    Args:
        folder: the run folder.
        every: updates between copies; None: no copies.
    """

    def __init__(self, folder: Path, every: int | None) -> None:
        self.path, self.every = folder / SNAPSHOT_FILE, every
        self.num_updates = 0

    def write_if_due(
        self, base: Mapping[str, Tensor], trajectory: Trajectory, base_fingerprint: str | None
    ) -> None:
        """Write the base if it has had `every` updates since the last copy.

        Raises:
            UserError: if the file cannot be written.
        """
        if self.every is None or len(trajectory) - self.num_updates < self.every:
            return
        values = _on_cpu(base)
        about = {  # safetensors stores metadata as text
            "num_updates": str(len(trajectory)),
            "updates": _digest(trajectory, len(trajectory)),
            "base_fingerprint": str(base_fingerprint),
            "content": fingerprint(values),
        }
        write_tensors(self.path, values, about)
        self.num_updates = len(trajectory)

    def restore(
        self, base: Mapping[str, nn.Parameter], trajectory: Trajectory, base_fingerprint: str | None
    ) -> int:
        """Set the base to the copy, if the copy belongs to the trajectory.

        Returns:
            The number of updates that the base now contains; 0 if there is no such copy.
        """
        if not self.path.exists():
            return 0
        try:
            values, about = open_tensors(self.path)
            num_updates = int(about["num_updates"])
            if about["content"] != fingerprint(values):
                raise ValueError("its digest does not match")
        except (UserError, KeyError, ValueError) as error:
            warnings.warn(f"{self.path} is ignored: {error}", stacklevel=2)
            return 0
        belongs = (
            0 < num_updates <= len(trajectory)
            and about.get("base_fingerprint") == str(base_fingerprint)
            and about.get("updates") == _digest(trajectory, num_updates)
            and values.keys() == base.keys()
        )
        if not belongs:
            return 0
        _copy_into(base, values)
        self.num_updates = num_updates
        return num_updates

    def drop(self) -> None:
        """Remove the copy."""
        remove_file(self.path, is_needed=False)
        self.num_updates = 0


def _on_cpu(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in base.items()}


def _copy_into(base: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in base.items():
        parameter.data.copy_(sharded_as(values[name], parameter))


def _digest(trajectory: Trajectory, num_updates: int) -> str:
    """Digest of the first updates and of everything that turns them into weights.

    It hashes the `repr` of GroupSpec and Update. Keep their names and shown fields, or copies that
    other versions wrote are no longer recognised.
    """
    parts: tuple[Any, ...] = (trajectory.seed, trajectory.distribution, trajectory.groups)
    if trajectory.rank_one:
        parts = (*parts, sorted(trajectory.rank_one))
    updates = trajectory.updates[:num_updates]
    if any(update.anchor for row in updates for update in row):
        parts = (*parts, [[update.anchor for update in row] for row in updates])
    text = repr((parts, updates))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
