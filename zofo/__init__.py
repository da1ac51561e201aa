"""zofo: hybrid fine-tuning, zeroth order for the base and first order for the adapter.

The public names; each is imported on first use, so that `import zofo` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zofo.adapters import create_adapter as create_adapter
    from zofo.artifact import BaseModel as BaseModel
    from zofo.artifact import load as load
    from zofo.artifact import save_artifact as save_artifact
    from zofo.checkpoint import load_checkpoint as load_checkpoint
    from zofo.errors import UserError as UserError
    from zofo.export import export_model as export_model
    from zofo.export_card import Exported as Exported
    from zofo.hub import push_to_hub as push_to_hub
    from zofo.interrupt import StopOnSignal as StopOnSignal
    from zofo.interrupt import TrainingInterrupt as TrainingInterrupt
    from zofo.methods import METHODS as METHODS
    from zofo.methods import param_groups as param_groups
    from zofo.methods import split_parameters as split_parameters
    from zofo.models import load_model as load_model
    from zofo.optim import HybridOptimizer as HybridOptimizer
    from zofo.perturb import Perturbation as Perturbation
    from zofo.perturb import SelfCheckError as SelfCheckError
    from zofo.reshuffle import ReshufflingSampler as ReshufflingSampler
    from zofo.trainer import HybridArguments as HybridArguments
    from zofo.trainer import HybridMixin as HybridMixin
    from zofo.trainer import HybridOptions as HybridOptions
    from zofo.trainer import HybridTrainer as HybridTrainer
    from zofo.trajectory import Trajectory as Trajectory
    from zofo.zeroth_loss import ZerothLoss as ZerothLoss

_HOMES = {
    "BaseModel": "artifact",
    "Exported": "export_card",
    "METHODS": "methods",
    "HybridArguments": "trainer",
    "HybridMixin": "trainer",
    "HybridOptimizer": "optim",
    "HybridOptions": "trainer",
    "HybridTrainer": "trainer",
    "Perturbation": "perturb",
    "ReshufflingSampler": "reshuffle",
    "SelfCheckError": "perturb",
    "StopOnSignal": "interrupt",
    "TrainingInterrupt": "interrupt",
    "Trajectory": "trajectory",
    "UserError": "errors",
    "ZerothLoss": "zeroth_loss",
    "create_adapter": "adapters",
    "export_model": "export",
    "load": "artifact",
    "load_checkpoint": "checkpoint",
    "load_model": "models",
    "param_groups": "methods",
    "push_to_hub": "hub",
    "save_artifact": "artifact",
    "split_parameters": "methods",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zofo' has no attribute {name!r}")
    return getattr(import_module(f"zofo.{_HOMES[name]}"), name)
