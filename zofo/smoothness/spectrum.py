"""Eigenvalues, traces and effective ranks of Hessian blocks, from Hessian-vector products alone.

    H V_m = V_m T_m + β_m v_{m+1} e_mᵀ     Lanczos from a normalised vector of random signs
    θ_i, s_i = eigen(T_m)                   Ritz values; an eigenvalue lies within β_m |s_mi|
    tr H ≈ n Σ_i s_1i² θ_i                  the s_1i² are the weights of the spectral density
    tr H = E[vᵀHv],  ‖H‖_F² = E‖Hv‖²        v of random signs (Hutchinson)
    tr H = tr QᵀHQ + E[vᵀPHPv]              Q spans H times probes, P = I − QQᵀ (Hutch++)

Rounding limits every result to u max |θ|, with u the machine epsilon of the vectors' dtype, so this
is added to every residual.

`lanczos` takes a fixed number of steps. Its cost is known in advance, and it gives an error bound
for every Ritz value. `converged_extremes` runs scipy's `eigsh` (ARPACK) to a tolerance instead. A
Ritz value never lies beyond the spectrum: the largest is too small, the smallest too large.

Memory: if the `num_steps` Lanczos vectors fit in `memory_bytes` (22 M weights, 20 steps: 1.8 GB),
Lanczos keeps them and stays orthogonal. Otherwise it keeps three, and Ritz values may occur twice,
which changes neither the extremes nor the density. ARPACK always keeps `ncv` vectors, and Hutch++
one vector for each three products.

References:
    Golub and Meurant, Matrices, Moments and Quadrature, 1994 (density by Lanczos).
    Paige, 1972, on Lanczos without reorthogonalisation.
    Hutchinson, 1990; Meyer, Musco, Musco, Woodruff, Hutch++, 2021, arXiv 2010.09649.
    Malladi et al., 2023, arXiv 2305.17333, assumption 1: effective rank tr(H) / ‖H‖.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from zofo.statistics.estimates import Estimate, mean_interval

TraceMethod = Literal["hutchinson", "hutch++"]
_BREAKDOWN: Final = 1e-6
"""A relative size of the next Lanczos vector that is rounding in float32: the space is complete."""


@dataclass(frozen=True)
class Ritz:
    """What Lanczos found from one start v of random signs.

    Attributes:
        values: Ritz values, ascending, [steps].
        residuals: distance of each value to an eigenvalue at most, rounding included, [steps].
        weights: share of each value in the spectral density; they add up to 1, [steps].
        curvature: vᵀHv.
        squared_norm: ‖Hv‖².
        is_orthogonal: whether Lanczos kept its vectors and orthogonalised against them.
    """

    values: np.ndarray
    residuals: np.ndarray
    weights: np.ndarray
    curvature: float
    squared_norm: float
    is_orthogonal: bool


@dataclass(frozen=True)
class Extreme:
    """An end of the spectrum: a Ritz value, and its distance to an eigenvalue at most."""

    value: float
    residual: float


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of a block.

    Attributes:
        num_parameters: size n of the block.
        top, bottom: largest and smallest Ritz value.
        trace, squared_norm: tr(H) and ‖H‖_F², with 95% intervals over probes.
        effective_rank: tr(H) / ‖H‖; None if H is 0. The interval is that of the trace, because
            ‖H‖ = max(|top|, |bottom|) counts as known.
        stable_rank: ‖H‖_F² / ‖H‖², in the same way.
        ritz: the result of every start.
        num_products: number of products with H.
    """

    num_parameters: int
    top: Extreme
    bottom: Extreme
    trace: Estimate
    squared_norm: Estimate
    effective_rank: Estimate | None
    stable_rank: Estimate | None
    ritz: tuple[Ritz, ...]
    num_products: int

    @property
    def norm(self) -> float:
        """Lower estimate of ‖H‖: max(|top|, |bottom|)."""
        return max(abs(self.top.value), abs(self.bottom.value))


def signs(num: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """A vector of random signs, [num], with the dtype and device of `like`."""
    drawn = torch.randint(0, 2, (num,), generator=generator, dtype=torch.int8)
    return drawn.to(like.device, like.dtype).mul_(2).sub_(1)


def lanczos(operator: Any, start: Tensor, num_steps: int, *, keeps_vectors: bool = True) -> Ritz:
    """Lanczos from one vector.

    Args:
        operator: symmetric; it computes `operator @ tensor` for float tensors [n].
        start: vector of signs, [n].
        num_steps: number of products; at most n are made.
        keeps_vectors: whether to keep all vectors and to orthogonalise against them.

    References:
        Parlett, The Symmetric Eigenvalue Problem, theorem 4.5.1: the error bound.
    """
    from scipy.linalg import eigh_tridiagonal

    squared = float((start.double() ** 2).sum())
    vector, previous = start / squared**0.5, torch.zeros_like(start)
    kept: list[Tensor] = []
    alphas: list[float] = []
    betas: list[float] = []
    curvature = squared_norm = 0.0
    for step in range(min(num_steps, len(start))):
        image = (operator @ vector).detach()
        alpha = inner_product(vector, image)
        if step == 0:  # `alpha` is that of v / ‖v‖, while vᵀHv is reported for v
            curvature, squared_norm = squared * alpha, squared * inner_product(image, image)
        image = image - alpha * vector
        if betas:
            image -= betas[-1] * previous
        # In exact arithmetic the image is orthogonal to all earlier vectors. Rounding destroys this
        # once a Ritz value has converged, and copies of that value would appear.
        if keeps_vectors:
            kept.append(vector)
            for other in kept:
                image -= inner_product(other, image) * other
        beta = inner_product(image, image) ** 0.5
        alphas.append(alpha)
        betas.append(beta)
        if beta <= _BREAKDOWN * max(map(abs, (*alphas, *betas))):
            betas[-1] = 0.0
            break
        previous, vector = vector, image / beta
    values, vectors = eigh_tridiagonal(np.asarray(alphas), np.asarray(betas[:-1]))
    rounding = torch.finfo(start.dtype).eps * np.abs(values).max(initial=0.0)
    return Ritz(
        values,
        betas[-1] * np.abs(vectors[-1]) + rounding,
        vectors[0] ** 2,
        curvature,
        squared_norm,
        keeps_vectors,
    )


def measure_spectrum(
    operator: Any,
    like: Tensor,
    *,
    num_steps: int = 20,
    num_starts: int = 1,
    num_probes: int = 8,
    method: TraceMethod = "hutchinson",
    seed: int = 0,
    memory_bytes: int = 4 << 30,
) -> Spectrum:
    """Ends, density, trace and ranks of a symmetric operator.

    Args:
        operator: object with `shape` (n, n) and `@`.
        like: a tensor with the dtype and device of the operator's vectors.
        num_steps: Lanczos steps from each start. 20 is our choice: the ends of the Hessian of a
            network lie apart from the other eigenvalues and converge in ten to thirty steps.
        num_starts: number of starts.
        num_probes: products for the trace. With "hutchinson" the first product of each start is one
            of them. "hutch++" has an interval if there are at least 9.
        method: "hutchinson" or "hutch++", which is better if few eigenvalues make up the trace.
        seed: seed of starts and probes.
        memory_bytes: the memory up to which Lanczos keeps its vectors.
    """
    num = operator.shape[0]
    generator = torch.Generator().manual_seed(seed)
    keeps = num * like.element_size() * min(num_steps, num) <= memory_bytes
    found = [
        lanczos(operator, signs(num, generator, like), num_steps, keeps_vectors=keeps)
        for _ in range(max(1, num_starts))
    ]
    # The outermost Ritz value over all starts is the best bound of each end.
    ends = [[Extreme(float(r.values[i]), float(r.residuals[i])) for r in found] for i in (0, -1)]
    bottom = min(ends[0], key=lambda end: end.value)
    top = max(ends[1], key=lambda end: end.value)
    num_products = sum(len(r.values) for r in found)
    curvatures = [r.curvature for r in found]
    squares = [r.squared_norm for r in found]
    if method == "hutch++":
        trace = hutchpp(operator, like, num_probes, generator)
        num_products += 3 * max(1, num_probes // 3)
    else:
        for _ in range(num_probes - len(found)):
            probe = signs(num, generator, like)
            image = (operator @ probe).detach()
            num_products += 1
            curvatures.append(inner_product(probe, image))
            squares.append(inner_product(image, image))
        trace = mean_interval(curvatures)
    squared_norm = mean_interval(squares)
    size = max(abs(top.value), abs(bottom.value))
    return Spectrum(
        num,
        top,
        bottom,
        trace,
        squared_norm,
        scale_estimate(trace, 1 / size) if size else None,
        scale_estimate(squared_norm, 1 / size**2) if size else None,
        tuple(found),
        num_products,
    )


def hutchpp(operator: Any, like: Tensor, num_products: int, generator: torch.Generator) -> Estimate:
    """The trace by Hutch++.

    A third of the products each serve to find a subspace, to compute the trace within it, and to
    estimate the trace of the complement. The interval is that of the complement.

    References:
        arXiv 2010.09649, algorithm 1.
    """
    num, third = operator.shape[0], max(1, min(num_products // 3, operator.shape[0]))

    def product(vector: Tensor) -> Tensor:
        image: Tensor = (operator @ vector).detach()
        return image

    # H times random vectors spans the directions of the largest eigenvalues.
    images = [product(signs(num, generator, like)) for _ in range(third)]
    basis, _ = torch.linalg.qr(torch.stack(images, dim=1))
    inside = sum(
        inner_product(basis[:, i], product(basis[:, i].contiguous())) for i in range(third)
    )
    beside = []
    for _ in range(third):
        probe = signs(num, generator, like)
        probe = probe - basis @ (basis.T @ probe)
        beside.append(inner_product(probe, product(probe)))
    rest = mean_interval(beside)
    low, high = inside + rest.low, inside + rest.high
    return replace(rest, value=inside + rest.value, low=low, high=high)


def converged_extremes(
    operator: Any,
    like: Tensor,
    *,
    num: int = 1,
    ncv: int | None = None,
    tolerance: float = 1e-3,
    max_restarts: int = 50,
    seed: int = 0,
) -> tuple[list[Extreme], list[Extreme]]:
    """The `num` smallest and largest eigenvalues to a tolerance, by scipy's `eigsh`.

    Args:
        operator: object with `shape` and `@`, such as a curvlinops operator.
        like: a tensor with the dtype and device of the operator's vectors.
        num: number of eigenvalues at each end.
        ncv: number of vectors that ARPACK keeps. The default 4 num + 2 is small because scipy's
            default of 20 takes 2.2 GB for 27 M weights.
        tolerance: relative tolerance of an eigenvalue.
        max_restarts: limit of ARPACK's restarts.
        seed: seed of the start.

    Returns:
        The smallest, ascending, and the largest, descending. A residual is ‖Hv − λv‖ of the unit
        eigenvector v.

    Raises:
        scipy.sparse.linalg.ArpackNoConvergence: if the tolerance is not reached.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    size = operator.shape[0]

    def product(x: np.ndarray) -> np.ndarray:
        vector = torch.from_numpy(np.ascontiguousarray(x.reshape(-1))).to(like.device, like.dtype)
        return np.asarray((operator @ vector).detach().cpu().numpy())

    dtype = np.dtype(str(like.dtype).removeprefix("torch."))
    generator = torch.Generator().manual_seed(seed)
    values, vectors = eigsh(
        LinearOperator((size, size), matvec=product, dtype=dtype),
        k=2 * num,
        which="BE",  # half of the values from each end
        ncv=min(size, 4 * num + 2 if ncv is None else ncv),
        tol=tolerance,
        maxiter=max_restarts,
        v0=signs(size, generator, like).cpu().numpy(),
    )
    order = np.argsort(values)
    found = [
        Extreme(
            float(values[i]),
            float(np.linalg.norm(product(vectors[:, i]) - values[i] * vectors[:, i])),
        )
        for i in order
    ]
    return found[:num], found[num:][::-1]


def density(ritz: Sequence[Ritz]) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights of the spectral density, averaged over starts; the weights sum to 1."""
    values = np.concatenate([r.values for r in ritz])
    weights = np.concatenate([r.weights for r in ritz]) / len(ritz)
    order = np.argsort(values)
    return values[order], weights[order]


def scale_estimate(estimate: Estimate, factor: float) -> Estimate:
    """An estimate times a positive number."""
    low, high = estimate.low * factor, estimate.high * factor
    return replace(estimate, value=estimate.value * factor, low=low, high=high)


def inner_product(a: Tensor, b: Tensor) -> float:
    """The inner product aᵀb, accumulated in float64."""
    return float((a.double() * b.double()).sum())
