"""The kinds of adapter, with the options and the default learning rates of each.

First-order rates are for AdamW, and zeroth-order rates for the plain steps of zo-peft. "Paper" is
arXiv 2604.09940. Its grids for zeroth-order adapters are:

    adapter         learning rate    smoothing radius eps
    LoRA, prompt    1e-3 to 1e-6     1e-2 to 1e-4
    prefix          1e-2 to 1e-4     1e-1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

AdapterType = Literal["lora", "dora", "rslora", "ia3", "prefix", "prompt", "p-tuning", "none"]
ADAPTER_TYPES: Final[tuple[str, ...]] = get_args(AdapterType)

_PLACES: Final = ("targets", "layers", "budget", "budget_batches")
_LORA_OPTIONS: Final = ("r", "alpha", "dropout", *_PLACES)


@dataclass(frozen=True)
class AdapterKind:
    """A kind of adapter; each `_source` names the origin of the value before it."""

    description: str  # the trained parameters
    options: tuple[str, ...]  # keys of the configuration's `adapter` that it uses, besides `type`
    lr: float  # first-order learning rate
    lr_source: str
    zo_lr: float  # learning rate of zeroth-order steps
    zo_lr_source: str
    zo_eps: float = 1e-3  # smoothing radius of zeroth-order steps
    zo_eps_source: str = "MeZO"
    num_virtual_tokens: int | None = None  # default length of kinds with virtual tokens


KINDS: Final[Mapping[str, AdapterKind]] = {
    "lora": AdapterKind(
        "W + (alpha / r) B A",
        _LORA_OPTIONS,
        lr=1e-3,
        lr_source="measured: SmolLM2-135M, SST-2",
        zo_lr=1e-4,
        zo_lr_source="paper: within its grid",
        zo_eps_source="paper: middle of its grid",
    ),
    "dora": AdapterKind(
        "LoRA on the directions of W's rows, and their lengths",
        _LORA_OPTIONS,
        lr=1e-3,
        lr_source="choice: as LoRA",
        zo_lr=1e-4,
        zo_lr_source="choice: as LoRA",
    ),
    "rslora": AdapterKind(
        "W + (alpha / √r) B A",
        _LORA_OPTIONS,
        lr=1e-3,
        lr_source="choice: as LoRA",
        zo_lr=1e-4,
        zo_lr_source="choice: as LoRA",
    ),
    "ia3": AdapterKind(
        "a factor for every key, value and inner activation",
        _PLACES,
        lr=3e-3,
        lr_source="the rate of IA3's authors, with Adafactor (arXiv 2205.05638)",
        zo_lr=1e-4,
        zo_lr_source="choice: as LoRA",
    ),
    "prefix": AdapterKind(
        "keys and values before the input, in every layer",
        ("num_virtual_tokens", "init_text"),
        lr=1e-2,
        lr_source="choice: as prompt",
        zo_lr=1e-3,
        zo_lr_source="paper: middle of its grid",
        zo_eps=1e-1,
        zo_eps_source="paper",
        num_virtual_tokens=5,
    ),
    "prompt": AdapterKind(
        "embeddings before the input",
        ("num_virtual_tokens", "init_text"),
        lr=1e-2,
        lr_source="measured: SmolLM2-135M, SST-2",
        zo_lr=1e-4,
        zo_lr_source="paper: within its grid",
        zo_eps_source="paper: middle of its grid",
        num_virtual_tokens=10,
    ),
    "p-tuning": AdapterKind(
        "embeddings before the input, made by a perceptron of three layers",
        ("num_virtual_tokens",),
        lr=1e-3,
        lr_source="choice: its weights are matrices, as LoRA's",
        zo_lr=1e-4,
        zo_lr_source="choice: as prompt",
        num_virtual_tokens=10,
    ),
}
"""The lengths are those of the paper. For p-tuning, it is the length of prompt."""
