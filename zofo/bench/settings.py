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
from zofo.sections import MAX_THREADS

CONTENDERS: Final = (
    "forward",
    "pass",
    "fo-peft",
    "hybrid",
    "hybrid-central",
    "hybrid-overlap",
    "hybrid-rows",
    "zo-ft",
    "zo-ft-rows",
    "zo-ft-central",
    "mezo",
    "naive-hybrid",
    "fo-ft",
    "fo-ft-fused",
)
_ON_FLOATS: Final = ("pass", "mezo", "naive-hybrid", "fo-ft", "fo-ft-fused")
"""The contenders that write or differentiate every weight, which a quantised base cannot have."""
_ON_CUDA_ONLY: Final = ("hybrid-overlap",)
_ADAPTERS: Final = tuple(name for name in ADAPTER_TYPES if name != "none")
_LIMITS: Final = {
    "batch": (1, 1 << 20),
    "length": (2, 1 << 20),  # The loss needs a second token to predict.
    "rounds": (1, 1 << 20),
    "elements": (1, 1 << 32),
}


@dataclass(frozen=True)
class Settings:
    """The settings of one benchmark."""

    model: str = "smollm2-135m"  # alias, hub id, folder, or random:SIZE
    adapter: str = "lora"  # for the contenders that have one
    batch: int = 8  # rows
    length: int = 32  # tokens per row
    dtype: str = "float32"  # of the base, and of the weight for the noise kernels
    device: str = "auto"
    threads: tuple[int, ...] = ()  # Each number is measured separately; empty: torch's number.
    distribution: str = "rademacher"  # of the directions in our steps; kernels run with both
    quantization: str | None = None  # of the base by bitsandbytes: nf4, fp4 or int8
    rounds: int = 7  # samples of each contender
    only: tuple[str, ...] = CONTENDERS  # in this order; the default is for CUDA
    elements: int = 1 << 25  # of the weight for the kernels: 128 MiB in float32 exceed the caches
    steps: bool = True  # whether to time steps
    memory: bool = True  # whether to measure peak memory
    noise: bool = True  # whether to time the noise kernels

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
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
        words += ["--quantization", self.quantization] if self.quantization else []
        every = contenders_on(self.device, self.quantization)
        words += ["--only", ",".join(self.only)] if self.only != every else []
        if not self.steps:
            return [*words, "--noise-only"]
        words += [] if self.memory else ["--no-memory"]
        return words + ([] if self.noise else ["--no-noise"])


def contenders_on(device: str, quantization: str | None = None) -> tuple[str, ...]:
    """The contenders that can run on such a device, with a base that is quantised or not."""
    without = {*(_ON_FLOATS if quantization else ()), *(() if device == "cuda" else _ON_CUDA_ONLY)}
    return tuple(name for name in CONTENDERS if name not in without)


def settings_from(
    *, threads: str | None, only: str | None, json_file: Path | None = None, **values: Any
) -> Settings:
    """The settings from the arguments of the command line, with device and threads resolved.

    Args:
        threads: numbers, separated by commas; None for torch's number.
        only: contenders, separated by commas; None for all that the device can run.
        json_file: where the results will go. It is checked first, because a benchmark takes long.
        values: the other attributes of `Settings`.

    Raises:
        UserError: for values outside their ranges, all of them at once.
    """
    problems: list[str] = []
    numbers = _numbers(threads, problems)
    chosen = _chosen(only, problems)
    settings = Settings(**values, threads=numbers, only=chosen)
    problems += _problems(settings)
    wrong_file = None if json_file is None else problem_of_target(json_file)
    problems += [] if wrong_file is None else [f"the JSON file {wrong_file}"]
    if problems:
        raise UserError("; ".join(problems))

    import torch

    from zofo.environment import resolve_device

    device = resolve_device(settings.device)
    can_be = contenders_on(device, settings.quantization)
    chosen = can_be if only is None else chosen
    for name in chosen:
        if name not in contenders_on(device):
            raise UserError(f"{name} needs CUDA, and the device is {device}; leave it out")
        if name not in can_be:
            raise UserError(
                f"{name} cannot run on a base in {settings.quantization}; choose from "
                f"{', '.join(can_be)}"
            )
    num_threads = settings.threads or (torch.get_num_threads(),)
    return dataclasses.replace(settings, device=device, only=chosen, threads=num_threads)


def _numbers(threads: str | None, problems: list[str]) -> tuple[int, ...]:
    if threads is None:
        return ()
    words = [word.strip() for word in threads.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= MAX_THREADS for word in words):
        problems.append(
            f"threads is {threads!r}; give numbers from 1 to {MAX_THREADS}, such as 1 or 1,2"
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
    from zofo.models.quantized import QUANTIZATIONS
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
    if settings.quantization not in (None, *QUANTIZATIONS):
        found.append(_no_such("quantization", str(settings.quantization), QUANTIZATIONS))
    prefix, _, size = settings.model.partition(":")
    if prefix == "random" and settings.quantization is not None:
        found.append(
            f"{settings.model} has no weights that could be quantised; name a model, such as "
            "smollm2-135m"
        )
    if prefix == "random" and size not in RANDOM:
        found.append(_no_such("random model", size, tuple(RANDOM)))
    return found


RANDOM: Final[dict[str, dict[str, int]]] = {
    "llama-tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    # The shape of SmolLM2-135M.
    "llama-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    # The shape of Llama 3.2 1B.
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
"""Shapes of the random models, whose input and output embeddings are tied."""
