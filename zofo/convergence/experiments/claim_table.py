"""The table of claims."""

from __future__ import annotations

from typing import Final

from zofo.convergence.claims import Claim
from zofo.convergence.experiments import claims_on_order, claims_on_rates

CLAIMS: Final[tuple[Claim, ...]] = (
    *claims_on_order.order(),
    *claims_on_order.order_n(),
    *claims_on_order.last(),
    *claims_on_order.zeroth(),
    *claims_on_order.samples(),
    *claims_on_rates.dimension(),
    *claims_on_rates.estimate(),
    *claims_on_rates.eps(),
    *claims_on_rates.two_rates(),
    *claims_on_rates.directions(),
    *claims_on_rates.growth(),
)
