"""Samples of a benchmark and their summary: medians, ratios within rounds, JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

from zofo.bench.settings import Settings

SCHEMA: Final = 1


@dataclass(frozen=True)
class Ratio:
    """The summed seconds of `above` over those of `below`."""

    label: str
    above: tuple[str, ...]
    below: tuple[str, ...]  # A name may occur twice, such as two forwards.

    def samples(self, seconds: Mapping[str, Sequence[float]]) -> list[float]:
        """One ratio for each round that measured every contender; empty if one is missing."""
        names = {*self.above, *self.below}
        if not names <= seconds.keys():
            return []
        rounds = min(len(seconds[name]) for name in names)
        return [
            sum(seconds[name][i] for name in self.above)
            / sum(seconds[name][i] for name in self.below)
            for i in range(rounds)
        ]


STEP_RATIOS: Final = (
    Ratio("hybrid / (fo-peft + forward)", ("hybrid",), ("fo-peft", "forward")),
    Ratio(
        "hybrid-central / (fo-peft + 2 forwards)",
        ("hybrid-central",),
        ("fo-peft", "forward", "forward"),
    ),
    Ratio("hybrid-overlap / hybrid", ("hybrid-overlap",), ("hybrid",)),
    Ratio("hybrid-rows / (fo-peft + forward)", ("hybrid-rows",), ("fo-peft", "forward")),
    Ratio(
        "(fo-peft + forward + pass) / (fo-peft + forward)",
        ("fo-peft", "forward", "pass"),
        ("fo-peft", "forward"),
    ),
    Ratio("hybrid / naive-hybrid", ("hybrid",), ("naive-hybrid",)),
    Ratio("hybrid-central / naive-hybrid", ("hybrid-central",), ("naive-hybrid",)),
    Ratio("zo-ft / mezo", ("zo-ft",), ("mezo",)),
    Ratio("zo-ft-rows / mezo", ("zo-ft-rows",), ("mezo",)),
    Ratio("zo-ft-central / mezo", ("zo-ft-central",), ("mezo",)),
    Ratio("zo-ft-central / 2 forwards", ("zo-ft-central",), ("forward", "forward")),
    Ratio("hybrid / fo-ft", ("hybrid",), ("fo-ft",)),
    Ratio("fo-ft-fused / fo-ft", ("fo-ft-fused",), ("fo-ft",)),
)
"""Ratios of times: a smaller ratio favours the first name."""

NOISE_RATIOS: Final = (
    Ratio("rademacher perturb / torch.add(out=)", ("torch.add(out=)",), ("rademacher perturb",)),
    Ratio("rademacher update / add_", ("add_",), ("rademacher update",)),
    Ratio("rademacher perturb / copy_", ("copy_",), ("rademacher perturb",)),
    Ratio("rademacher update / copy_", ("copy_",), ("rademacher update",)),
    Ratio("gaussian perturb / (randn + add)", ("randn + add",), ("gaussian perturb",)),
    Ratio("gaussian update / (randn + add)", ("randn + add",), ("gaussian update",)),
)
"""Ratios of speeds: a larger ratio favours the first name, whose time is therefore below."""


def spread(samples: Sequence[float], unit: str = "") -> dict[str, Any]:
    """Median, minimum, maximum and the samples, with the unit in each key."""
    return {
        f"median{unit}": median(samples) if samples else None,
        f"min{unit}": min(samples, default=None),
        f"max{unit}": max(samples, default=None),
        f"samples{unit}": list(samples),
    }


def ratios_of(
    table: Sequence[Ratio], seconds: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Any]]:
    """Label -> spread of every ratio whose contenders were measured."""
    found = {ratio.label: ratio.samples(seconds) for ratio in table}
    return {label: spread(samples) for label, samples in found.items() if samples}


@dataclass
class Row:
    """Facts about a contender besides its times."""

    what: str
    forward_equivalents: int
    state_bytes: int | None = None


@dataclass
class StepTimes:
    """The times of the steps with one number of threads."""

    threads: int
    rows: dict[str, Row] = field(default_factory=dict)  # contender -> facts
    seconds: dict[str, list[float]] = field(default_factory=dict)  # contender -> one a round
    failed: dict[str, str] = field(default_factory=dict)  # contender -> reason

    def as_dict(self) -> dict[str, Any]:
        """The times and their ratios, as JSON can hold them."""
        return {
            "threads": self.threads,
            "contenders": {
                name: {
                    "what": row.what,
                    "forward_equivalents": row.forward_equivalents,
                    "optimizer_state_bytes": row.state_bytes,
                    **spread(self.seconds.get(name, []), "_s"),
                    **({"failed": self.failed[name]} if name in self.failed else {}),
                }
                for name, row in self.rows.items()
            },
            "ratios": ratios_of(STEP_RATIOS, self.seconds),
        }


@dataclass
class NoiseTimes:
    """The times of the kernels with one number of threads."""

    threads: int
    num_bytes: dict[str, int] = field(default_factory=dict)  # kernel -> bytes read and written
    seconds: dict[str, list[float]] = field(default_factory=dict)  # kernel -> one a round

    def as_dict(self) -> dict[str, Any]:
        """The times, speeds and ratios, as JSON can hold them."""
        return {
            "threads": self.threads,
            "kernels": {
                name: {
                    "bytes": size,
                    "gigabytes_per_s": self.rate(name),
                    **spread(self.seconds.get(name, []), "_s"),
                }
                for name, size in self.num_bytes.items()
            },
            "ratios": ratios_of(NOISE_RATIOS, self.seconds),
        }

    def rate(self, name: str) -> float | None:
        """Median bytes moved per second, in GB/s; None if the kernel was not timed."""
        samples = self.seconds.get(name)
        return self.num_bytes[name] / median(samples) / 1e9 if samples else None


@dataclass
class Memory:
    """Peak memory of the contenders, each in a process of its own."""

    # Resident code of the compiled noise kernels (numba, LLVM), which does not depend on the model.
    # It is None on an accelerator, whose memory does not hold it.
    kernels_bytes: int | None = None
    # Contender -> part -> bytes, or "failed" -> reason.
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ratios(self, layer_bytes: int) -> dict[str, float]:
        """Peak of hybrid over FO-PEFT, also without the kernels' code and one layer's buffer."""
        found = {}
        peft = self.contenders.get("fo-peft", {}).get("peak")
        for name in ("hybrid", "hybrid-central", "hybrid-rows"):
            ours = self.contenders.get(name, {})
            if peft is None or "peak" not in ours:
                continue
            whole, code = ours["peak"], ours["kernels"]
            rest = whole - code - layer_bytes
            found[f"{name} / fo-peft"] = whole / peft
            if code:  # On an accelerator, the code takes no memory.
                found[f"the same without the kernels' code ({name})"] = (whole - code) / peft
            found[f"the same without one layer's scratch, too ({name})"] = rest / peft
        return found


@dataclass
class Results:
    """All measurements so far. The benchmark fills them while it runs."""

    settings: Settings
    environment: dict[str, Any] = field(default_factory=dict)
    model: dict[str, int] = field(default_factory=dict)
    memory: Memory | None = None
    steps: list[StepTimes] = field(default_factory=list)
    noise: list[NoiseTimes] = field(default_factory=list)
    is_complete: bool = False

    def as_dict(self) -> dict[str, Any]:
        """All measurements with settings and environment, as JSON can hold them."""
        memory = None
        if self.memory is not None:
            memory = {
                "kernels_bytes": self.memory.kernels_bytes,
                "contenders": self.memory.contenders,
                "ratios": self.memory.ratios(self.model.get("largest_layer_bytes", 0)),
            }
        return {
            "schema": SCHEMA,
            "is_complete": self.is_complete,
            "command": ["zofo", "bench", *self.settings.arguments()],
            "arguments": self.settings.as_dict(),
            "environment": self.environment,
            "model": self.model,
            "memory": memory,
            "steps": [times.as_dict() for times in self.steps],
            "noise": [times.as_dict() for times in self.noise],
        }
