"""zofo: hybrid fine-tuning, zeroth order for the base and first order for the adapter.

The public names; each is imported on first use, so that `import zofo` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zofo.version import __version__ as __version__

if TYPE_CHECKING:
    from zofo.errors import UserError as UserError
    from zofo.models.adapters import create_adapter as create_adapter
    from zofo.models.loading import load_model as load_model
    from zofo.optim.blocks import split_parameters as split_parameters
    from zofo.optim.methods import METHODS as METHODS
    from zofo.optim.methods import param_groups as param_groups
    from zofo.optim.optimizer import HybridOptimizer as HybridOptimizer
    from zofo.optim.reshuffle import ReshufflingSampler as ReshufflingSampler
    from zofo.optim.trajectory import Trajectory as Trajectory
    from zofo.optim.zeroth_loss import ZerothLoss as ZerothLoss
    from zofo.perturb.view import Perturbation as Perturbation
    from zofo.perturb.view import SelfCheckError as SelfCheckError
    from zofo.rewards.options import RewardOptions as RewardOptions
    from zofo.saved.artifact import BaseSpec as BaseSpec
    from zofo.saved.artifact import load as load
    from zofo.saved.artifact import save_artifact as save_artifact
    from zofo.saved.checkpoint import load_checkpoint as load_checkpoint
    from zofo.saved.checkpoint import save_checkpoint as save_checkpoint
    from zofo.saved.export import export_model as export_model
    from zofo.saved.export_card import Exported as Exported
    from zofo.saved.hub import push_to_hub as push_to_hub
    from zofo.tasks.preference import PreferenceOptions as PreferenceOptions
    from zofo.trainer.answers import RewardSource as RewardSource
    from zofo.trainer.interrupt import StopOnSignal as StopOnSignal
    from zofo.trainer.interrupt import TrainingInterrupt as TrainingInterrupt
    from zofo.trainer.mixin import HybridArguments as HybridArguments
    from zofo.trainer.mixin import HybridMixin as HybridMixin
    from zofo.trainer.mixin import HybridOptions as HybridOptions
    from zofo.trainer.mixin import HybridTrainer as HybridTrainer
    from zofo.trainer.pairs import PairSource as PairSource

_HOMES = {
    "BaseSpec": "saved.artifact",
    "Exported": "saved.export_card",
    "METHODS": "optim.methods",
    "HybridArguments": "trainer.mixin",
    "HybridMixin": "trainer.mixin",
    "HybridOptimizer": "optim.optimizer",
    "HybridOptions": "trainer.mixin",
    "HybridTrainer": "trainer.mixin",
    "PairSource": "trainer.pairs",
    "Perturbation": "perturb.view",
    "PreferenceOptions": "tasks.preference",
    "ReshufflingSampler": "optim.reshuffle",
    "RewardOptions": "rewards.options",
    "RewardSource": "trainer.answers",
    "SelfCheckError": "perturb.self_check",
    "StopOnSignal": "trainer.interrupt",
    "TrainingInterrupt": "trainer.interrupt",
    "Trajectory": "optim.trajectory",
    "UserError": "errors",
    "ZerothLoss": "optim.zeroth_loss",
    "create_adapter": "models.adapters",
    "export_model": "saved.export",
    "load": "saved.artifact",
    "load_checkpoint": "saved.checkpoint",
    "load_model": "models.loading",
    "param_groups": "optim.methods",
    "push_to_hub": "saved.hub",
    "save_artifact": "saved.artifact",
    "save_checkpoint": "saved.checkpoint",
    "split_parameters": "optim.blocks",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zofo' has no attribute {name!r}")
    return getattr(import_module(f"zofo.{_HOMES[name]}"), name)
