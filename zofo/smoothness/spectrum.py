"""Eigenvalues, traces and effective ranks of Hessian blocks, from products with vectors alone.

    H V_m = V_m T_m + β_m v_{m+1} e_mᵀ     Lanczos from a vector of random signs, normalised
    θ_i, s_i = eigen(T_m)                   Ritz values; an eigenvalue lies within β_m |s_mi|
    tr H ≈ n Σ_i s_1i² θ_i                  and so for every function of H: the spectral density
    tr H = E[vᵀHv],  ‖H‖_F² = E‖Hv‖²        v of random signs (Hutchinson)
    tr H = tr QᵀHQ + E[vᵀPHPv]              Q spans H times probes, P = I − QQᵀ (Hutch++)

In floating point nothing is known better than to a rounding of the largest value: u max |θ| is
added to every residual, u the spacing of the vectors' dtype at 1.

A fixed number of Lanczos steps costs what was said before and always answers, with an error bound
for every Ritz value; `converged_extremes` asks scipy's `eigsh` (ARPACK) for a tolerance instead.
A Ritz value never lies beyond the spectrum: top is approached from below, bottom from above.

Memory: Lanczos keeps its `num_steps` vectors to stay orthogonal where they fit in `memory_bytes`
(22 M weights, 20 steps: 1.8 GB), else three: Ritz values may then come twice, which touches neither
the extremes nor the density. ARPACK keeps `ncv` vectors whatever happens, Hutch++ a third of its
products.

References:
    Golub and Meurant, Matrices, Moments and Quadrature, 1994 (density by Lanczos).
    Paige, 1972, on Lanczos without reorthogonalisation.
    Hutchinson, 1990; Meyer, Musco, Musco, Woodruff, Hutch++, 2021, arXiv 2010.09649.
    Malladi et al., 2023, arXiv 2305.17333, assumption 1: effective rank tr(H) / ‖H‖.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from zofo.statistics.estimates import Estimate, mean_interval

TraceMethod = Literal["hutchinson", "hutch++"]
_BREAKDOWN: Final = 1e-6
"""A Lanczos vector this small beside the largest is rounding (float32): the space is invariant."""


@dataclass(frozen=True)
class Ritz:
    """What Lanczos found from one start.

    Attributes:
        values: Ritz values, ascending, [steps].
        residuals: an eigenvalue lies within this of the value, rounding included, [steps].
        weights: share of each value in the density, adding up to 1, [steps].
        curvature: vᵀHv of the start v, whose entries are ±1.
        squared_norm: ‖Hv‖².
        is_orthogonal: whether the vectors were kept and reorthogonalised.
    """

    values: np.ndarray
    residuals: np.ndarray
    weights: np.ndarray
    curvature: float
    squared_norm: float
    is_orthogonal: bool


@dataclass(frozen=True)
class Extreme:
    """An end of the spectrum.

    Attributes:
        value: Ritz value.
        residual: an eigenvalue lies within this of it.
    """

    value: float
    residual: float


@dataclass(frozen=True)
class Spectrum:
    """Of a block.

    Attributes:
        num_parameters: its size n.
        top, bottom: largest and smallest Ritz value.
        trace: of H, with a 95% interval over probes.
        squared_norm: ‖H‖_F², likewise.
        effective_rank: tr(H) / ‖H‖, with the trace's interval; ‖H‖ = max(|top|, |bottom|) is taken
            as known. None where H is 0.
        stable_rank: ‖H‖_F² / ‖H‖², likewise.
        ritz: of every start.
        num_products: products with H.
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
        """‖H‖, as far as it is known: max(|top|, |bottom|)."""
        return max(abs(self.top.value), abs(self.bottom.value))


def signs(num: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """A vector of random signs, [num], from a generator of its own."""
    drawn = torch.randint(0, 2, (num,), generator=generator, dtype=torch.int8)
    return drawn.to(like.device, like.dtype).mul_(2).sub_(1)


def lanczos(
    operator: Any,
    start: Tensor,
    num_steps: int,
    *,
    keeps_vectors: bool = True,
    on_product: Callable[[], None] | None = None,
) -> Ritz:
    """Lanczos from one vector.

    Args:
        operator: symmetric; `operator @ tensor` for float tensors of shape [n].
        start: [n], of signs.
        num_steps: products; at most n.
        keeps_vectors: keep all vectors and orthogonalise against them.
        on_product: called after each product.

    References:
        Module text; the error bound is Parlett, The Symmetric Eigenvalue Problem, theorem 4.5.1.
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
        if on_product is not None:
            on_product()
        alpha = _dot(vector, image)
        if step == 0:
            curvature, squared_norm = squared * alpha, squared * _dot(image, image)
        image = image - alpha * vector
        if betas:
            image -= betas[-1] * previous
        if keeps_vectors:
            kept.append(vector)
            for other in kept:
                image -= _dot(other, image) * other
        beta = _dot(image, image) ** 0.5
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
    on_product: Callable[[], None] | None = None,
) -> Spectrum:
    """Ends, density, trace and ranks of a symmetric operator.

    Args:
        operator: with `shape` (n, n) and `@`.
        like: a tensor of the dtype and device of its vectors.
        num_steps: Lanczos steps from each start; 20 by choice: the ends of network Hessians stand
            apart from the bulk and converge in ten to thirty.
        num_starts: starts.
        num_probes: products for the trace; the starts' own first products count among those of
            "hutchinson". Hutch++ has an interval from 9 on.
        method: "hutchinson" or "hutch++", which wins where few eigenvalues carry the trace.
        seed: of the probes.
        memory_bytes: up to which Lanczos keeps its vectors.
        on_product: called after each product.
    """
    num = operator.shape[0]
    generator = torch.Generator().manual_seed(seed)
    keeps = num * like.element_size() * min(num_steps, num) <= memory_bytes
    found = [
        lanczos(
            operator,
            signs(num, generator, like),
            num_steps,
            keeps_vectors=keeps,
            on_product=on_product,
        )
        for _ in range(max(1, num_starts))
    ]
    top = max((Extreme(float(r.values[-1]), float(r.residuals[-1])) for r in found), key=_value)
    bottom = min((Extreme(float(r.values[0]), float(r.residuals[0])) for r in found), key=_value)
    num_products = sum(len(r.values) for r in found)
    curvatures = [r.curvature for r in found]
    squares = [r.squared_norm for r in found]
    if method == "hutch++":
        trace = hutchpp(operator, like, num_probes, generator, on_product)
        num_products += 3 * max(1, num_probes // 3)
    else:
        for _ in range(num_probes - len(found)):
            probe = signs(num, generator, like)
            image = (operator @ probe).detach()
            if on_product is not None:
                on_product()
            num_products += 1
            curvatures.append(_dot(probe, image))
            squares.append(_dot(image, image))
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


def hutchpp(
    operator: Any,
    like: Tensor,
    num_products: int,
    generator: torch.Generator,
    on_product: Callable[[], None] | None = None,
) -> Estimate:
    """The trace by Hutch++: a third of the products each to find a subspace, in it, and beside it.

    Returns:
        The trace; its interval is that of the part beside the subspace.

    References:
        arXiv 2010.09649, algorithm 1.
    """
    num, third = operator.shape[0], max(1, min(num_products // 3, operator.shape[0]))

    def product(vector: Tensor) -> Tensor:
        image = (operator @ vector).detach()
        if on_product is not None:
            on_product()
        return image

    images = [product(signs(num, generator, like)) for _ in range(third)]
    basis, _ = torch.linalg.qr(torch.stack(images, dim=1))
    inside = sum(_dot(basis[:, i], product(basis[:, i].contiguous())) for i in range(third))
    beside = []
    for _ in range(third):
        probe = signs(num, generator, like)
        probe = probe - basis @ (basis.T @ probe)
        beside.append(_dot(probe, product(probe)))
    rest = mean_interval(beside)
    return replace(
        rest,
        mean=inside + rest.mean,
        low=None if rest.low is None else inside + rest.low,
        high=None if rest.high is None else inside + rest.high,
    )


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
        operator: with `shape` and `@`, or a curvlinops operator.
        like: a tensor of the dtype and device of its vectors.
        num: at each end.
        ncv: vectors that ARPACK keeps; None: the least that is sensible, 2 (2 num) + 2. scipy's
            default of 20 is 2.2 GB for 27 M weights.
        tolerance: relative to an eigenvalue's size.
        max_restarts: of ARPACK.
        seed: of the start.

    Returns:
        Smallest ascending, largest descending; residuals are ‖Hv − λv‖ of the unit vectors found.

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
        which="BE",
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
    """Values and weights of the spectral density, averaged over starts; weights add up to 1."""
    values = np.concatenate([r.values for r in ritz])
    weights = np.concatenate([r.weights for r in ritz]) / len(ritz)
    order = np.argsort(values)
    return values[order], weights[order]


def scale_estimate(estimate: Estimate, factor: float) -> Estimate:
    """An estimate times a positive number."""
    return replace(
        estimate,
        mean=estimate.mean * factor,
        low=None if estimate.low is None else estimate.low * factor,
        high=None if estimate.high is None else estimate.high * factor,
    )


def _value(extreme: Extreme) -> float:
    return extreme.value


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())
