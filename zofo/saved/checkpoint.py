"""Loads a checkpoint of `HybridTrainer` for a base that the caller has loaded."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from zofo.optim.trajectory import TRAJECTORY_FILE
from zofo.saved.assemble import Assembly, Parts


def load_checkpoint(base: nn.Module, folder: str | Path) -> nn.Module:
    """Load a checkpoint, or a folder that `HybridTrainer.save_model` wrote.

    Args:
        base: the model that training began with, without adapter; it is changed in place.
        folder: the folder that holds the adapter and the trajectory.

    Returns:
        The trained `PeftModel`, in evaluation mode.

    Raises:
        UserError: if the trajectory is missing, belongs to another base or adapter, or a file is
            damaged.
    """
    folder = Path(folder)
    parts = Parts(folder=folder, adapter=folder, trajectory=folder / TRAJECTORY_FILE)
    model: nn.Module = Assembly(parts, base).run().model
    return model
