"""An advice as JSON and as lines of text: the numbers, their intervals and their reasons."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from zofo.advice.moments import Moments
from zofo.advice.rates import ZerothRate
from zofo.advice.setting import Advice
from zofo.config.schema import AUTO
from zofo.disk.files import finite
from zofo.statistics.resampling import Interval


def as_json(advice: Advice) -> dict[str, Any]:
    """Plain values for JSON. Infinite and undefined numbers become null."""
    setting = advice.setting
    asked = [key for key in ("eps", "base_lr", "adapter_lr") if getattr(setting, key) == AUTO]
    first = advice.first
    value = {
        "advised": {k: getattr(advice, k) for k in asked if getattr(advice, k) is not None},
        "remarks": advice.remarks,
        "cost": {
            "forward_equivalents": advice.cost,
            "of_the_run": advice.cost / setting.forwards_of_run,
        },
        "progress": None if advice.progress is None else advice.progress.as_dict(),
        "is_hopeless": advice.is_hopeless,
        "eps": None if advice.plateau is None else asdict(advice.plateau),
        "zeroth_order": {
            "start": _point(advice.at_start, advice.zeroth_start),
            "later": _point(advice.at_later, advice.zeroth_later),
        },
        "groups": None
        if advice.split is None
        else {
            "reason": advice.split.reason,
            "gain": advice.split.gain,
            "rates": {name: i.as_dict() for name, i in advice.split.groups.items()},
        },
        "first_order": None
        if first is None
        else {
            "best": first.best,
            "start": first.start,
            "shrinkage": first.shrinkage,
            "num_steps": first.num_steps,
            "moved": first.moved,
            "runs": [run.as_dict() for run in first.runs],
            "along": [{**asdict(a), "rayleigh": a.rayleigh} for a in advice.along],
        },
        "caps": {name: asdict(found) for name, found in advice.caps.items()},
        "capped": advice.capped,
        "setting": asdict(setting),
    }
    return finite(value)


def lines_of(advice: Advice) -> list[str]:
    """The advice in a few lines of text."""
    setting, lines = advice.setting, []
    for key in ("eps", "base_lr", "adapter_lr"):
        value = getattr(advice, key)
        if getattr(setting, key) == AUTO and value is not None:
            lines.append(f"{key} {_rate(value)}: {reason_of(advice, key)}")
    lines += advice.remarks
    lines += cap_lines(advice)
    lines.append(
        f"the advice cost {advice.cost:.0f} forward-equivalents; the run costs "
        f"{setting.forwards_of_run:.0f}"
    )
    return lines


def reason_of(advice: Advice, key: str) -> str:
    """The reason for an advised number."""
    is_capped = key.removesuffix("_lr") in advice.capped
    return ("the theorem's cap; without it: " if is_capped else "") + _reason_of(advice, key)


def _reason_of(advice: Advice, key: str) -> str:
    if key == "eps":
        found = advice.plateau
        assert found is not None
        if not found.exists:
            return f"no plateau was found; the difference has an error of {found.error:.0%} there"
        low = "≤ " if found.is_open_low else ""
        high = "≥ " if found.is_open_high else ""
        return f"the plateau reaches from {low}{found.low:.1e} to {high}{found.high:.1e}"
    block = key.removesuffix("_lr")
    if block == advice.setting.zeroth:
        found_rate = advice.zeroth_later or advice.zeroth_start
        assert found_rate is not None
        assert advice.zeroth_start is not None
        text = f"{advice.zeroth_start.rate:.2g} at the start ({advice.zeroth_start.limited_by})"
        if advice.zeroth_later is not None:
            text += f", {found_rate.rate:.2g} later ({found_rate.limited_by})"
        if math.isfinite(found_rate.one_step):
            text += f"; best for one step {found_rate.one_step:.2g}"
        if math.isfinite(found_rate.stable):
            text += f"; half of the stable rate {found_rate.stable:.2g}"
        if advice.split is not None and advice.split.rates and isinstance(advice.base_lr, dict):
            text += f"; by groups, because {advice.split.reason}"
        return text
    first = advice.first
    assert first is not None
    if first.is_below_harm:
        return (
            f"{first.best:.2g} is below all of {len(first.runs)} trainings of {first.num_steps} "
            f"steps, all of which raised the loss, times √(n/N) = {first.shrinkage:.2f}"
        )
    what = "not measurably worse than the best" if first.moved else "harmless"
    return (
        f"{first.best:.2g} is the largest rate that is {what} among {len(first.runs)} trainings of "
        f"{first.num_steps} steps, times √(n/N) = {first.shrinkage:.2f}"
    )


def cap_lines(advice: Advice) -> list[str]:
    """The theorem's caps, and how far they lie from the advised rates."""
    lines = []
    for block in ("base", "adapter"):
        caps = {name: c for name, c in advice.caps.items() if name.startswith(f"{block} ")}
        rate = getattr(advice, f"{block}_lr")
        if not caps or rate is None:
            continue
        if all(math.isinf(c.rate) for c in caps.values()):
            lines.append(
                f"the theorem's cap of {block}_lr cannot be computed, since no positive curvature "
                "was measured; it lowers no rate"
            )
            continue
        top = max(rate.values()) if isinstance(rate, dict) else rate
        shown = ", ".join(f"{c.rate:.1e} with {c.reading}" for c in caps.values())
        least = min(c.rate for c in caps.values())
        text = f"the theorem's cap of {block}_lr with c = 1: {shown}"
        if top > 2 * least and block not in advice.capped:
            text += f"; it is a worst case, {top / least:.0f} times below the advised rate"
        done = "applied" if advice.setting.caps == "apply" else "not applied"
        lines.append(f"{text} ({done})")
    return lines


def _rate(value: float | dict[str, float]) -> str:
    if isinstance(value, dict):
        rates = sorted(set(value.values()))
        return f"{rates[0]:g} to {rates[-1]:g} in {len(value)} patterns"
    return f"{value:g}"


def _point(found: Moments | None, rate: ZerothRate | None) -> dict[str, Any] | None:
    if found is None or rate is None:
        return None
    return {
        "loss": found.loss,
        "num_weights": found.num_weights,
        "num_directions": found.num,
        "largest_slope": found.largest_slope,
        **{name: i.as_dict() for name, i in found.intervals().items()},
        "rate": {k: v.as_dict() if isinstance(v, Interval) else v for k, v in vars(rate).items()},
    }
