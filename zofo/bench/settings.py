"""Settings of a benchmark, all checked before any measurement."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zofo.disk.files import problem_of_target
from zofo.errors import UserError
from zofo.models.adapter_kinds import ADAPTER_TYPES

CONTENDERS: Final = (
    "forward",
    "fo-peft",
    "hybrid",
    "hybrid-central",
    "hybrid-overlap",
    "zo-ft",
    "zo-ft-central",
    "mezo",
    "naive-hybrid",
    "fo-ft",
    "fo-ft-fused",
)
_ON_CUDA_ONLY: Final = ("hybrid-overlap",)
_ADAPTERS: Final = tuple(name for name in ADAPTER_TYPES if name != "none")
_LIMITS: Final = {
    "batch": (1, 1 << 20),
    "length": (2, 1 << 20),
    "rounds": (1, 1 << 20),
    "elements": (1, 1 << 32),
}
_MAX_THREADS: Final = 1024


@dataclass(frozen=True)
class Settings:
    """One benchmark.

    Attributes:
        model: alias, hub id, folder, or `random:SIZE`.
        adapter: of the contenders that have one; any of `zofo.models.adapter_kinds.KINDS`.
        batch: rows.
        length: tokens a row; at least 2, so that there is one to predict.
        dtype: of the base, and of the weight that the noise kernels work on.
        device: auto, cpu, cuda or mps.
        threads: each number is a run of its own; empty: what torch is set to.
        distribution: of our directions in the steps; the kernels are measured with both.
        rounds: samples of each contender.
        only: the contenders, in the order of `CONTENDERS`; the default is for CUDA.
        elements: size of the weight for the noise kernels; the default, 128 MiB in float32, is
            larger than the caches.
        steps: whether to time steps.
        memory: whether to measure peak memory.
        noise: whether to time the noise kernels.
    """

    model: str = "smollm2-135m"
    adapter: str = "lora"
    batch: int = 8
    length: int = 32
    dtype: str = "float32"
    device: str = "auto"
    threads: tuple[int, ...] = ()
    distribution: str = "rademacher"
    rounds: int = 7
    only: tuple[str, ...] = CONTENDERS
    elements: int = 1 << 25
    steps: bool = True
    memory: bool = True
    noise: bool = True

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def arguments(self) -> list[str]:
        """The command line that asks for these settings."""
        words = []
        for key in ("model", "adapter", "batch", "length", "dtype", "device"):
            words += [f"--{key}", str(getattr(self, key))]
        words += ["--threads", ",".join(map(str, self.threads))] if self.threads else []
        for key in ("distribution", "rounds", "elements"):
            words += [f"--{key}", str(getattr(self, key))]
        words += ["--only", ",".join(self.only)] if self.only != contenders_on(self.device) else []
        if not self.steps:
            return [*words, "--noise-only"]
        words += [] if self.memory else ["--no-memory"]
        return words + ([] if self.noise else ["--no-noise"])


def contenders_on(device: str) -> tuple[str, ...]:
    """All that can be measured on such a device."""
    return tuple(n for n in CONTENDERS if device == "cuda" or n not in _ON_CUDA_ONLY)


def settings_from(
    *, threads: str | None, only: str | None, json_file: Path | None = None, **values: Any
) -> Settings:
    """Settings from the command line's words, with device and threads filled in.

    Args:
        threads: numbers, separated by commas; None: what torch is set to.
        only: contenders, separated by commas; None: all that the device can.
        json_file: where the results will go.
        values: the other attributes of `Settings`.

    Raises:
        UserError: for values outside their ranges, all of them at once.
    """
    problems: list[str] = []
    numbers = _numbers(threads, problems)
    chosen = _chosen(only, problems)
    settings = Settings(**values, threads=numbers, only=chosen)
    problems += _problems(settings)
    if json_file is not None:
        problems += _problems_of_file(json_file)
    if problems:
        raise UserError("; ".join(problems))

    import torch

    from zofo.environment import resolve_device

    device = resolve_device(settings.device)
    can_be = contenders_on(device)
    chosen = can_be if only is None else chosen
    for name in chosen:
        if name not in can_be:
            raise UserError(f"{name} needs CUDA, and the device is {device}; leave it out")
    num_threads = settings.threads or (torch.get_num_threads(),)
    return dataclasses.replace(settings, device=device, only=chosen, threads=num_threads)


def _numbers(threads: str | None, problems: list[str]) -> tuple[int, ...]:
    if threads is None:
        return ()
    words = [word.strip() for word in threads.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= _MAX_THREADS for word in words):
        problems.append(
            f"threads is {threads!r}; give numbers from 1 to {_MAX_THREADS}, such as 1 or 1,2"
        )
        return ()
    return tuple(dict.fromkeys(map(int, words)))


def _chosen(only: str | None, problems: list[str]) -> tuple[str, ...]:
    if only is None:
        return CONTENDERS
    words = [word.strip() for word in only.split(",")]
    for word in words:
        if word not in CONTENDERS:
            problems.append(_no_such("contender", word, CONTENDERS))
    return tuple(name for name in CONTENDERS if name in words)


def _no_such(kind: str, value: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(value.lower(), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{kind} {value!r} does not exist; {hint}choose from {', '.join(known)}"


def _problems(settings: Settings) -> list[str]:
    from zofo.models.loading import DTYPES
    from zofo.noise.combine import DISTRIBUTIONS

    found = []
    for key, (least, most) in _LIMITS.items():
        value = getattr(settings, key)
        if not least <= value <= most:
            found.append(f"{key} is {value}; it must lie in [{least}, {most}]")
    for key, known in (
        ("adapter", _ADAPTERS),
        ("dtype", tuple(DTYPES)),
        ("distribution", DISTRIBUTIONS),
    ):
        if getattr(settings, key) not in known:
            found.append(_no_such(key, getattr(settings, key), known))
    prefix, _, size = settings.model.partition(":")
    if prefix == "random" and size not in RANDOM:
        found.append(_no_such("random model", size, tuple(RANDOM)))
    return found


def _problems_of_file(path: Path) -> list[str]:
    """Check the output file first, because a benchmark takes minutes."""
    problem = problem_of_target(path)
    return [] if problem is None else [f"the JSON file {problem}"]


RANDOM: Final[dict[str, dict[str, int]]] = {
    "llama-tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    # SmolLM2-135M's shape.
    "llama-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    # Llama 3.2 1B's shape.
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
"""Shapes of the random models, embeddings tied."""
