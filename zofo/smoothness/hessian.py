"""A block of the Hessian as curvlinops' linear operator, which scipy's solvers accept.

    v -> H_bb v = ∇_b (∇_b f · v)

curvlinops' own product runs forward mode over reverse mode and repeats both for every vector. Here
the graph of the gradient is kept (`zofo.smoothness.objective.GradientGraph`), which took half the
time on MiniLM with LoRA: 12 s against 22 s a product, with 16 rows of 55 tokens on one busy core.
Shapes, formats and the conversion for scipy are curvlinops'.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zofo.errors import UserError
from zofo.smoothness.objective import GradientGraph, Objective, Vector

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a dependency uses torch.jit
        from curvlinops import HessianLinearOperator
except ModuleNotFoundError as error:
    raise UserError(
        "Hessians need curvlinops-for-pytorch, which is not installed; pip install 'zofo[theory]'"
    ) from error


class BlockHessian(HessianLinearOperator):
    """∇²_bb f for the parameters of block b; the other parameters are fixed.

    Args:
        objective: f.
        parameters: name -> parameter of the block.
        at: parameters, of the block or not, that take other values.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        at: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        self.names = list(parameters)
        self.graph = GradientGraph(objective, parameters, at)
        self.num_products = 0
        super().__init__(
            objective.model,
            _NoLoss(),  # the objective computes its own loss
            list(parameters.values()),
            [(torch.zeros(1), torch.zeros(1))],  # a batch that `_matmat` never looks at
            check_deterministic=False,
            num_data=1,
        )

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:  # noqa: N803
        """H times a matrix in curvlinops' format: [*shape, columns] for each parameter."""
        columns = []
        for k in range(M[0].shape[-1]):
            vector = {n: m[..., k].contiguous() for n, m in zip(self.names, M, strict=True)}
            columns.append(self.graph.product(vector, self.names))
            self.num_products += 1
        return [torch.stack([c[n] for c in columns], dim=-1) for n in self.names]

    def flat(self, vector: Vector) -> Tensor:
        """A vector of the block as one tensor, [parameters]."""
        return torch.cat([vector[n].reshape(-1) for n in self.names])


class _NoLoss(nn.Module):
    reduction = "mean"

    def forward(self, prediction: Any, target: Any) -> Any:
        return prediction
