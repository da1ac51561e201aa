"""A copy of the moved base, so that resuming a long run replays only the end of its trajectory.

One file in the run folder, as large as the base, replaced every so many steps and removed when
training has ended. It says which updates it contains; where it is damaged or does not belong to the
checkpoint, the whole trajectory is replayed instead.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from zofo.disk.files import fingerprint, open_tensors, write_tensors
from zofo.errors import UserError
from zofo.optim.trajectory import Trajectory
from zofo.saved.layout import SNAPSHOT_FILE


class BaseSnapshot:
    """The newest copy of a run's base.

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
    """Of the first updates and what turns them into weights."""
    parts = (trajectory.seed, trajectory.distribution, trajectory.groups)
    text = repr((parts, trajectory.updates[:num_updates]))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
