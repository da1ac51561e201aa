"""Loads a checkpoint of `HybridTrainer` into a model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from zofo.optim.trajectory import TRAJECTORY_FILE
from zofo.saved.assemble import Assembly, Parts


def load_checkpoint(base: nn.Module, folder: str | Path) -> nn.Module:
    """The trained model of a checkpoint, or of a folder that a hybrid trainer's save_model wrote.

    Args:
        base: the model that the run began with, without adapter; changed in place.
        folder: where the adapter and the base's trajectory are.

    Returns:
        The `PeftModel`, in evaluation mode.

    Raises:
        UserError: if the folder holds no trajectory, or that of another base or adapter, or is
            damaged.
    """
    folder = Path(folder)
    parts = Parts(folder=folder, adapter=folder, trajectory=folder / TRAJECTORY_FILE)
    model: nn.Module = Assembly(parts, base).run().model
    return model
