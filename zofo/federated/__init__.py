"""Federated training: the base by scalars, the adapter by a strategy of Flower.

The names are imported on first use. `client_app` and `HybridStrategy` need `pip install
'zofo[flower]'`; the others do not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zofo.federated.base_log import BaseLog as BaseLog
    from zofo.federated.exchange import Coordinator as Coordinator
    from zofo.federated.flower import HybridStrategy as HybridStrategy
    from zofo.federated.flower import client_app as client_app
    from zofo.federated.options import FederatedOptions as FederatedOptions
    from zofo.federated.party import LocalData as LocalData
    from zofo.federated.party import Party as Party
    from zofo.federated.skew import label_skew as label_skew

_HOMES = {
    "BaseLog": "base_log",
    "Coordinator": "exchange",
    "FederatedOptions": "options",
    "HybridStrategy": "flower",
    "LocalData": "party",
    "Party": "party",
    "client_app": "flower",
    "label_skew": "skew",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zofo.federated' has no attribute {name!r}")
    try:
        return getattr(import_module(f"zofo.federated.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "flwr":
            raise
        from zofo.errors import UserError

        raise UserError(
            f"zofo.federated.{name} needs Flower, which is not installed; run "
            "pip install 'zofo[flower]'"
        ) from error
