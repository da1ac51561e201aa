"""What the measurements of a run say: fits, constants with intervals, verdicts.

Verdicts are "confirmed", "refuted" or "undecided at this scale", by intervals, and speak of the one
path that was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from zofo.smoothness.fits import MIN_SPREAD, Growth, fit_growth, ratio

FILE: Final = "smoothness.json"
VERSION: Final = 1
SERIES: Final = {
    "gradient": "‖H_bb g_b‖ / ‖g_b‖: the block along its own gradient",
    "alone": "gradient difference over the step of the block alone",
    "whole": "gradient difference of the block over the whole step",
}
"""Local constants along a path, and what each is."""
ABOVE_ROUNDING: Final = 10.0
"""A finite difference counts where it is this many times what rounding would show."""


def series_of(
    points: Sequence[Mapping[str, Any]], kind: str, block: str
) -> list[tuple[int, float, float]]:
    """(step, ‖∇f‖, local constant) of a block along a path, where it stands out of the rounding.

    Args:
        points: records of the path.
        kind: in `SERIES`.
        block: "base", "adapter", or for "whole" a part.
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
    records: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that was measured, with fits and verdicts, as plain values.

    Args:
        records: measurements.
        config: of the run.
        options: of the measurement.
    """
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
        shared = sorted(both[0].keys() & both[1].keys())
        if len(shared) >= 2:
            ratios[kind] = asdict(ratio([both[0][s] for s in shared], [both[1][s] for s in shared]))
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
                block: asdict(growth)
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
    """What the theorem assumes and its figure shows, with a verdict and its reason each."""
    claims = []
    for kind in ("gradient", "alone"):
        for block, growth in fits.get(kind, {}).items():
            exponent = growth.power.exponent
            why = (
                f"exponent {_interval(asdict(exponent))} over gradient norms that differ by a "
                f"factor of {growth.spread:.3g}, {growth.power.num_points} points"
            )
            if growth.spread < MIN_SPREAD:
                why += f"; a factor of {MIN_SPREAD:g} would be the least that decides"
            symbol = "ℓ_x" if block == "base" else "ℓ_y"
            claims.append(_claim(f"{symbol} ({kind}) grows with ‖∇f‖", growth.grows, why))
            claims.append(
                _claim(
                    f"{symbol} ({kind}) grows more slowly than ‖∇f‖²", growth.is_subquadratic, why
                )
            )
    for kind in ("gradient", "alone"):
        if kind in ratios:
            found = ratios[kind]
            low, high = found["low"], found["high"]
            verdict = "undecided at this scale"
            if low is not None and (low > 10 or high < 0.1):
                verdict = "confirmed"
            elif low is not None and low > 0.1 and high < 10:
                verdict = "refuted"
            claims.append(
                _claim(
                    f"base and adapter ({kind}) differ by more than a factor of 10",
                    verdict,
                    f"base over adapter {_interval(found)}, geometric mean over the path",
                )
            )
    for record in majoriser:
        if record.get("kappa") is None:
            claims.append(
                _claim(
                    f"diag(‖H_xx‖, ‖H_yy‖) majorises the Hessian at step {record['step']}",
                    "undecided at this scale",
                    "a block's Hessian is 0 here, so that D cannot be inverted",
                )
            )
            continue
        claims.append(
            _claim(
                f"diag(‖H_xx‖, ‖H_yy‖) majorises the Hessian at step {record['step']}",
                record["verdict"],
                f"κ = {record['kappa']:.3g} ± {record['residual']:.2g} by Lanczos; "
                f"{sum(s <= 1 for s in record['sampled'])} of {len(record['sampled'])} sampled "
                f"vectors pass, the largest quotient is {max(record['sampled']):.2g}",
            )
        )
    on_path = majorised_steps(points, fits.get("gradient", {}))
    if on_path is not None:
        passed, total, worst = on_path
        claims.append(
            _claim(
                "diag(ℓ_x(‖∇f‖), ℓ_y(‖∇f‖)) of the envelopes majorises on the steps made",
                "confirmed" if passed == total else "refuted",
                f"{passed} of {total} steps have |ΔᵀHΔ| ≤ ℓ_x‖Δx‖² + ℓ_y‖Δy‖²; largest quotient "
                f"{worst:.3g}",
            )
        )
    return claims


def majorised_steps(
    points: Sequence[Mapping[str, Any]], fits: Mapping[str, Growth]
) -> tuple[int, int, float] | None:
    """Steps on which |ΔᵀH̄Δ| ≤ ℓ_x(‖∇f‖)‖Δx‖² + ℓ_y(‖∇f‖)‖Δy‖², all steps, largest quotient.

    ℓ of the envelopes. None where a block that moved has no fit.
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


def _claim(text: str, verdict: str, why: str) -> dict[str, str]:
    return {"claim": text, "verdict": verdict, "why": why}


def _interval(quantity: Mapping[str, Any]) -> str:
    if quantity["low"] is None:
        return f"{quantity['value']:.3g} (no interval)"
    return f"{quantity['value']:.3g} [{quantity['low']:.3g}, {quantity['high']:.3g}]"


def _name(config: Mapping[str, Any], section: str, key: str) -> str:
    value = config.get(section)
    return str(value.get(key)) if isinstance(value, Mapping) else str(value)
