"""Rank-one directions that the rows of a batch share in turn, at the price of one forward.

    ℓ_i(w + eps v_d(i))  of all rows in one forward          d(i): the direction of row i
    s_k = Σ_{i: d(i) = k} (ℓ_i(w + eps v_k) − ℓ_i(w)) / eps  ℓ_i: row i's share of the batch's loss
    g = Σ_k s_k v_k                                          an unbiased estimate of ∇f(w)

With one direction, s is the difference of the batch loss. With a direction a row, the estimate's
second moment falls from d (‖∇f‖² + σ²/B) to d (‖∇f‖² + σ²)/B, where σ² is a row's variance.

References:
    "Evolution Strategies at the Hyperscale" (EGGROLL), arXiv 2511.16652.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zofo.errors import UserError
from zofo.perturb.side_path import NotByRows, RowDirections
from zofo.perturb.view import Perturbation


@dataclass(frozen=True)
class RowPlan:
    """The directions of the examples of one micro-batch.

    Attributes:
        directions: of the rows of the model's input.
        of_examples: the direction of each example, less the first one: int64, [examples].
    """

    directions: RowDirections
    of_examples: Tensor

    @classmethod
    def of(
        cls, per_step: int | str, start: int, losses: Tensor, examples: Tensor | None
    ) -> RowPlan:
        """Plan a micro-batch.

        Args:
            per_step: `StepOptions.directions_per_step`.
            start: number of examples in the earlier micro-batches of the step.
            losses: the shares of this one's examples, [examples].
            examples: the example of each row of the model's input, int64 [rows], where an example
                has several rows, such as one for each candidate; None: one row each.
        """
        num_examples = len(losses)
        index = torch.arange(start, start + num_examples)
        own = index if per_step == "rows" else index % int(per_step)
        first, num = (start, num_examples) if per_step == "rows" else (0, int(per_step))
        if examples is not None:
            # The loss may be that of the first examples, whose rows come first.
            examples = examples.cpu()
            examples = examples[examples < num_examples]
        of_rows = own if examples is None else own[examples]
        return cls(RowDirections(first, num, of_rows), own - first)

    def of_one(self, example: int) -> RowDirections:
        """One example's direction, for all rows."""
        return RowDirections(self.directions.first + int(self.of_examples[example]))

    def gathered(self, differences: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the differences of the rows that share a direction.

        A row whose difference is not finite is left out, unless all are.

        Args:
            differences: float64, [examples].

        Returns:
            s, float64 [directions], and the number of rows left out, shape [].
        """
        is_finite = torch.isfinite(differences)
        kept = torch.where(is_finite | ~is_finite.any(), differences, 0.0)
        index = self.of_examples.to(kept.device)
        sums = kept.new_zeros(self.directions.num)
        # One row at a time, so that the order of summation does not depend on the device.
        ranks = torch.arange(len(kept)) // self.directions.num
        for rank in range(int(ranks[-1]) + 1 if len(ranks) else 0):
            part = (ranks == rank).to(kept.device)
            sums[index[part]] += kept[part]
        return sums, (~is_finite).sum()


def shares_of(losses: Tensor | None) -> Tensor:
    """The rows' shares of the loss: the argument.

    Raises:
        UserError: if it has another shape than [rows].
    """
    if losses is None or losses.ndim != 1:
        found = None if losses is None else list(losses.shape)
        raise UserError(
            "with directions_per_step above 1, the closure must return each row's share of the "
            f"loss, shape [rows], whose sum is the loss; it returned {found}. Or set "
            "directions_per_step=1"
        )
    return losses


def row_gradients(
    evaluate: Callable[..., Tensor],
    plan: RowPlan,
    losses: Tensor,
    perturbation: Perturbation,
    *,
    eps: float,
    self_check: bool,
    has_moved: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the projected gradients of the directions that rows share.

    Args:
        evaluate: `projected_gradients`, which lacks the loss, `directions` and `self_check`.
        plan: the directions.
        losses: the rows' shares of the unperturbed loss, [examples].
        perturbation: the view that `evaluate` uses. Layers that cannot tell the rows apart get
            independent signs, one direction for the batch.
        eps: smoothing radius.
        self_check: check also that rows do not act on each other's loss, with one evaluation more.
        has_moved: whether the base has moved. Its weights then keep their kinds of direction.

    Returns:
        s, float64 [directions], and the number of rows left out, shape [].

    Raises:
        UserError: if rows act on each other, or a layer newly cannot tell the rows apart.
    """
    while True:
        try:
            (own,) = evaluate(losses, directions=plan.directions, self_check=self_check)
            break
        except NotByRows as error:
            if has_moved:
                raise UserError(
                    f"{error}: the rows of this layer's input cannot be told, though those of the "
                    "first step could; set directions_per_step=1, or begin with a batch of several "
                    "rows"
                ) from error
            perturbation.only_rank_one(perturbation.rank_one - error.found.keys())
    if self_check and len(losses) > 1:
        last = len(losses) - 1
        (alone,) = evaluate(losses, directions=plan.of_one(last))
        loss = losses.detach()[last]
        _check_rows_apart(loss, eps * own[last], eps * alone[last])
    return plan.gathered(own)


def _check_rows_apart(loss: Tensor, own: Tensor, alone: Tensor) -> None:
    """Check that a row's loss does not depend on the directions of other rows.

    Args:
        loss: the row's share of the unperturbed loss, shape [].
        own: its change where each row has its own direction.
        alone: its change where all rows have this row's direction.
    """
    rounding = max(1e-5, 4 * torch.finfo(loss.dtype).eps) * abs(float(loss)) + 1e-7
    if abs(float(own - alone)) > 0.05 * abs(float(alone)) + rounding:
        raise UserError(
            f"a row's share of the loss changes by {float(own):.4g} where each row has a direction "
            f"of its own, and by {float(alone):.4g} where all rows have this row's, so rows of the "
            "batch act on each other (batch statistics, in-batch negatives, or a model whose first "
            "dimension is not the batch); set directions_per_step=1"
        )
