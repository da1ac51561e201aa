"""The summary of a run's measurements: fits, constants with intervals, verdicts.

A verdict is "confirmed", "refuted" or "undecided at this scale". It follows from an interval and
holds for the measured path only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from zofo.smoothness.fits import MIN_SPREAD, Growth, fit_growth, ratio
from zofo.smoothness.records import finite

FILE: Final = "smoothness.json"
VERSION: Final = 1
SERIES: Final = {
    "gradient": "‖H_bb g_b‖ / ‖g_b‖: the block along its own gradient",
    "alone": "gradient difference over the step of the block alone",
    "whole": "gradient difference of the block over the whole step",
}
"""Kind of local constant along a path -> its definition."""
ABOVE_ROUNDING: Final = 10.0
"""A finite difference counts if it is this many times as large as its rounding."""


def series_of(
    points: Sequence[Mapping[str, Any]], kind: str, block: str
) -> list[tuple[int, float, float]]:
    """(step, ‖∇f‖, local constant) of a block along a path; constants within rounding are dropped.

    Args:
        points: records of the path.
        kind: key of `SERIES`.
        block: "base", "adapter", or a part if `kind` is "whole".
    """
    found = []
    for point in points:
        u = point["grad_norm"]["full"]
        if kind == "gradient":
            own = (point.get("gradient") or {}).get(block)
            value, floor = (own or {}).get("norm"), 0.0
        else:
            values = [entry.get(block) for entry in point[kind]]
            value = max((v for v in values if v), default=None)
            floors = "floor_whole" if kind == "whole" else "floor"
            floor = (point.get(floors) or {}).get(block) or 0.0
        if value and u and value > ABOVE_ROUNDING * floor:
            found.append((int(point["step"]), float(u), float(value)))
    return found


def summarise(
    records: Sequence[Mapping[str, Any]], config: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """All measurements of a run with fits and verdicts, as plain values."""
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_kind.setdefault(str(record["kind"]), []).append(record)
    points = sorted(by_kind.get("path", []), key=lambda r: r["step"])
    fits: dict[str, dict[str, Growth]] = {}
    ratios: dict[str, Any] = {}
    for kind in SERIES:
        fits[kind] = {}
        for block in ("base", "adapter"):
            found = series_of(points, kind, block)
            if len(found) >= 2 and len({u for _, u, _ in found}) > 1:
                fits[kind][block] = fit_growth([u for _, u, _ in found], [v for *_, v in found])
        both = [{s: v for s, _, v in series_of(points, kind, b)} for b in ("base", "adapter")]
        # Only steps at which both blocks have a constant: their ratio is paired.
        shared = sorted(both[0].keys() & both[1].keys())
        if len(shared) >= 2:
            base, adapter = ([values[step] for step in shared] for values in both)
            ratios[kind] = finite(ratio(base, adapter))
    return {
        "version": VERSION,
        "model": _name(config, "model", "name"),
        "task": _name(config, "task", "name"),
        "adapter": _name(config, "adapter", "type"),
        "method": config.get("method"),
        "seed": config.get("seed"),
        "options": dict(options),
        "path": points,
        "spectra": by_kind.get("spectrum", []),
        "directional": by_kind.get("directional", []),
        "majoriser": by_kind.get("majoriser", []),
        "fits": {
            kind: {
                block: finite(growth)
                | {"grows": growth.grows, "is_subquadratic": growth.is_subquadratic}
                for block, growth in blocks.items()
            }
            for kind, blocks in fits.items()
        },
        "base_over_adapter": ratios,
        "claims": claims_of(points, fits, ratios, by_kind.get("majoriser", [])),
    }


def claims_of(
    points: Sequence[Mapping[str, Any]],
    fits: Mapping[str, Mapping[str, Growth]],
    ratios: Mapping[str, Mapping[str, Any]],
    majoriser: Sequence[Mapping[str, Any]],
) -> list[dict[str, str]]:
    """The theorem's assumptions and the findings of its figure, each with verdict and reason."""
    claims = []

    def claim(text: str, verdict: str, why: str) -> None:
        claims.append({"claim": text, "verdict": verdict, "why": why})

    for kind in ("gradient", "alone"):
        for block, growth in fits.get(kind, {}).items():
            exponent = growth.power.exponent
            why = (
                f"exponent {_interval(finite(exponent))} over gradient norms that differ by a "
                f"factor of {growth.spread:.3g}, {growth.power.num_points} points"
            )
            if growth.spread < MIN_SPREAD:
                why += f"; a verdict needs a factor of {MIN_SPREAD:g} or more"
            symbol = "ℓ_x" if block == "base" else "ℓ_y"
            subquadratic = growth.is_subquadratic
            claim(f"{symbol} ({kind}) grows with ‖∇f‖", growth.grows, why)
            claim(f"{symbol} ({kind}) grows more slowly than ‖∇f‖²", subquadratic, why)
    for kind in ("gradient", "alone"):
        if kind in ratios:
            found = ratios[kind]
            low, high = found["low"], found["high"]
            # The whole interval must lie beyond a factor of 10, or the whole of it within.
            verdict = "undecided at this scale"
            if low is not None and (low > 10 or high < 0.1):
                verdict = "confirmed"
            elif low is not None and low > 0.1 and high < 10:
                verdict = "refuted"
            claim(
                f"base and adapter ({kind}) differ by more than a factor of 10",
                verdict,
                f"base over adapter {_interval(found)}, geometric mean over the path",
            )
    for record in majoriser:
        verdict = "undecided at this scale"
        why = "the Hessian of a block is 0 at this step, so D has no inverse"
        if record.get("kappa") is not None:
            verdict = record["verdict"]
            why = (
                f"κ = {record['kappa']:.3g} ± {record['residual']:.2g} by Lanczos; "
                f"{sum(s <= 1 for s in record['sampled'])} of {len(record['sampled'])} sampled "
                f"vectors pass, the largest quotient is {max(record['sampled']):.2g}"
            )
        step = record["step"]
        claim(f"diag(‖H_xx‖, ‖H_yy‖) majorises the Hessian at step {step}", verdict, why)
    on_path = majorised_steps(points, fits.get("gradient", {}))
    if on_path is not None:
        passed, total, worst = on_path
        claim(
            "diag(ℓ_x(‖∇f‖), ℓ_y(‖∇f‖)) of the envelopes majorises on the steps made",
            "confirmed" if passed == total else "refuted",
            f"{passed} of {total} steps have |ΔᵀHΔ| ≤ ℓ_x‖Δx‖² + ℓ_y‖Δy‖²; largest quotient "
            f"{worst:.3g}",
        )
    return claims


def majorised_steps(
    points: Sequence[Mapping[str, Any]], fits: Mapping[str, Growth]
) -> tuple[int, int, float] | None:
    """Number of steps with |ΔᵀH̄Δ| ≤ ℓ_x(‖∇f‖)‖Δx‖² + ℓ_y(‖∇f‖)‖Δy‖², of all, largest quotient.

    ℓ is that of the envelopes. Returns None if a block that moved has no fit.
    """
    quotients = []
    for point in points:
        u, lengths = point["grad_norm"]["full"], point["step_norm"]
        bound = 0.0
        for block in ("base", "adapter"):
            length = lengths.get(block) or 0.0
            if length and block not in fits:
                return None
            if length:
                constant, slope = fits[block].envelope
                bound += (constant + slope * u) * length**2
        for entry in point["whole"]:
            curvature = entry.get("step_curvature")
            if bound and curvature is not None:
                quotients.append(abs(curvature) / bound)
    if not quotients:
        return None
    return sum(q <= 1 for q in quotients), len(quotients), max(quotients)


def _interval(quantity: Mapping[str, Any]) -> str:
    if quantity["low"] is None:
        return f"{quantity['value']:.3g} (no interval)"
    return f"{quantity['value']:.3g} [{quantity['low']:.3g}, {quantity['high']:.3g}]"


def _name(config: Mapping[str, Any], section: str, key: str) -> str:
    value = config.get(section)
    return str(value.get(key)) if isinstance(value, Mapping) else str(value)
