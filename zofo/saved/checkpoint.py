"""Loads a checkpoint of `HybridTrainer` into a model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from zofo.models.adapters import attach_adapter, check_adapter
from zofo.optim.blocks import split_parameters
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory, check_base


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
    trajectory, header = Trajectory.load(folder / TRAJECTORY_FILE)
    check_adapter(folder, header)
    model = attach_adapter(base, folder)
    moved = split_parameters(model).base
    check_base(moved, header.get("base_fingerprint"), str(folder))
    trajectory.replay(moved)
    return model.eval()
