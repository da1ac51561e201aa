"""The cost of eps: error, bias and size of an estimate, and the largest harmless eps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from zofo.convergence.cells import Result
from zofo.convergence.epochs import epochs_to
from zofo.convergence.fits import exponent
from zofo.convergence.measures import Measured, Study, series_of


def of_estimate(study: Study, *, experiment: str, where: Mapping[str, Any], of: str) -> Measured:
    """Exponent in eps of an estimate's "error" or "bias" (`of`) in one cell.

    The error is the root mean square of s − ⟨v, ∇f⟩, the bias the norm of the mean of g − ∇f.
    """
    result = study.one(experiment, where)
    weights, eps = study.weights(result), result.arrays["eps"]
    if of == "error":
        log_y = 0.5 * np.log(result.arrays["error2"] @ weights)
    else:
        log_y = _log_bias(result, weights)
    titles = {"error": "root mean square of s − ⟨v, ∇f⟩", "bias": "‖E g − ∇f‖"}
    return Measured(exponent(eps, log_y), [series_of("measured", eps, log_y)], "eps", titles[of])


def _log_bias(result: Result, weights: np.ndarray) -> np.ndarray:
    """Logarithm of the norm of the mean, without the part that chance adds to its square."""
    bias = np.moveaxis(result.arrays["bias"], 1, -1)  # [eps, d, seeds]
    mean = bias @ weights
    # E‖mean‖² exceeds the squared bias by the variance of the mean over the seeds.
    spread = (bias**2 @ weights - mean**2).sum(1) / bias.shape[-1]
    square = (mean**2).sum(1) - spread
    return np.asarray(0.5 * np.log(np.where(square > 0, square, np.nan)))


def size_across(
    study: Study, *, experiment: str, where: Mapping[str, Any], label: str, x_title: str
) -> Measured:
    """Exponent in a label of E‖g‖², at the largest eps."""
    results = study.find(experiment, where)
    xs = [float(result.cell.labels[label]) for result in results]
    log_y = np.stack([np.log(r.arrays["size2"][-1] @ study.weights(r)) for r in results])
    series = [series_of("measured", xs, log_y)]
    return Measured(exponent(xs, log_y), series, x_title, "E‖g‖² where ∇f = 0")


def harmless_eps(
    study: Study,
    *,
    experiment: str,
    where: Mapping[str, Any],
    label: str,
    x_title: str,
    factor: float = 2.0,
) -> Measured:
    """Exponent in a label of the eps that makes the tuned value `factor` times as large."""
    per_label: dict[float, list[Result]] = {}
    for result in study.find(experiment, where):
        per_label.setdefault(float(result.cell.labels[label]), []).append(result)
    rows = []
    for results in per_label.values():
        ordered = sorted(results, key=lambda r: float(r.cell.labels["eps"]))
        eps = np.array([float(r.cell.labels["eps"]) for r in ordered])
        logs = np.stack([study.tuned(r, "x").log_value[-1] for r in ordered])
        # The value rises with eps, so its negative falls. `epochs_to` finds the first crossing.
        rows.append(epochs_to(eps, -logs, -(logs[0] + np.log(factor))))
    log_y = np.stack(rows)
    xs = [*per_label]
    return Measured(
        exponent(xs, log_y),
        [series_of("measured", xs, log_y)],
        x_title,
        f"eps that makes the value {factor:g} times as large",
    )
