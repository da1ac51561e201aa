"""Whether an exported folder is the trained model: the same logits on the same tokens.

    deviation = max |exported − trained| / max |trained|

over the last positions of a few inputs. The tolerance is that of the coarser of the two dtypes:

    float64, float32   1e-4    merging W + BA rounds once a weight, and sums run in another order
    float16            2e-2    weights and activations rounded to 10 bits of mantissa
    bfloat16           1e-1    7 bits

Measured on SmolLM2-135M with a merged LoRA: 2e-6, 6e-3, 3e-2. So wide a tolerance could hide an
error; therefore merging is checked in float32 before anything is rounded, and every weight on disk
must be the rounded one, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from zofo.disk.files import fingerprint
from zofo.errors import UserError
from zofo.saved.source import Source

TOLERANCES: Final[Mapping[str, float]] = {
    "float64": 1e-4,
    "float32": 1e-4,
    "float16": 2e-2,
    "bfloat16": 1e-1,
}
"""Largest deviation allowed, as a share of the largest logit."""
NUM_INPUTS: Final = 8
_NUM_POSITIONS: Final = 16
_RANDOM_LENGTH: Final = 24


@dataclass(frozen=True)
class Samples:
    """What the two models are compared on.

    Attributes:
        inputs: token ids.
        texts: for comparing tokenizers.
        origin: where they are from, in words.
    """

    inputs: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    origin: str


@dataclass(frozen=True)
class Deviation:
    """How far two models' logits are apart.

    Attributes:
        largest: max |a − b|.
        scale: max |b|.
    """

    largest: float
    scale: float

    @property
    def share(self) -> float:
        """The largest difference as a share of the largest logit."""
        return self.largest / self.scale if self.scale else self.largest

    def within(self, tolerance: float) -> bool:
        """Whether it is at most that share; never for NaN."""
        return self.share <= tolerance


def tolerance_of(*dtypes: str) -> float:
    """The largest of the dtypes' tolerances."""
    return max(TOLERANCES[dtype] for dtype in dtypes)


def sample_inputs(source: Source, model: Any, tokenizer: Any, *, seed: int = 0) -> Samples:
    """Test rows of the task if its data can be read, else random tokens that the model knows."""
    from zofo.tasks.encode import Encoder
    from zofo.tasks.load import load_splits
    from zofo.tasks.spec import Example, TaskSpec

    if source.task is not None:
        try:
            spec = TaskSpec(**source.task)
            splits = load_splits(spec, seed=source.base.seed, tokenizer=tokenizer)
            encoder = Encoder(tokenizer, head=source.base.head, max_length=spec.max_length)
            examples = splits.test[:NUM_INPUTS]
            encoded = [encoder(example) for example in examples]
        except (UserError, OSError, ValueError):  # data that are not at hand any more
            pass
        else:
            texts = tuple(
                f"{e.prompt}{e.candidates[0]}{e.ending}"
                if isinstance(e, Example)
                else "".join(text for text, _ in e.segments)
                for e in examples
            )
            name = f"{len(examples)} test rows of {spec.name}"
            return Samples(tuple(row.rows[0] for row in encoded), texts, name)
    generator = torch.Generator().manual_seed(seed)
    num_tokens = min(len(tokenizer), len(model.get_input_embeddings().weight))
    ids = torch.randint(num_tokens, (NUM_INPUTS, _RANDOM_LENGTH), generator=generator)
    texts = tuple(tokenizer.decode(row) for row in ids)
    return Samples(
        tuple(tuple(row) for row in ids.tolist()), texts, f"{NUM_INPUTS} rows of random tokens"
    )


@torch.no_grad()
def logits_of(model: nn.Module, samples: Samples) -> list[Tensor]:
    """The last positions' logits of each input: float32, [positions, vocabulary] or [classes]."""
    device = next(model.parameters()).device
    found = []
    for row in samples.inputs:
        ids = torch.tensor([row], device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids  # any tokens do
        logits = model(**inputs).logits[0]
        last = logits[-_NUM_POSITIONS:] if logits.ndim == 2 else logits
        found.append(last.float().cpu().clone())
    return found


def deviation(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Deviation:
    """How far two models' logits are apart on the same inputs."""
    # Python's max drops NaN, torch's keeps it.
    largest = torch.stack([(a - b).abs().max() for a, b in zip(found, expected, strict=True)])
    scale = torch.stack([b.abs().max() for b in expected])
    return Deviation(float(largest.max()), float(scale.max()))


def digests_of(model: nn.Module) -> dict[str, tuple[torch.dtype, str]]:
    """Name -> dtype and digest of every tensor of a model's state, for `check_weights`."""
    return {name: (t.dtype, _digest(t)) for name, t in model.state_dict().items()}


def check_weights(found: nn.Module, expected: Mapping[str, tuple[torch.dtype, str]]) -> None:
    """Refuse a model that came back from disk with other weights.

    Args:
        found: the model that was read.
        expected: `digests_of` the model that was written, which need not exist any more.

    Raises:
        UserError: if a tensor is missing, differs in a bit, or holds NaN.
    """
    loaded = found.state_dict()
    for name, (dtype, digest) in expected.items():
        other = loaded.get(name)
        # Some models keep some weights in float32 whatever they are stored in.
        other = None if other is None else other.to(dtype)
        if other is None or _digest(other) != digest or bool(other.isnan().any()):
            raise UserError(
                f"the weight {name!r} cannot be saved by transformers, or does not come back as it "
                "was (is it finite in this dtype?); nothing was exported. Try dtype float32"
            )


def _digest(tensor: Tensor) -> str:
    return fingerprint({"": tensor})


def check_tokenizers(found: Any, expected: Any, samples: Samples) -> None:
    """Refuse a tokenizer that came back from disk as another.

    Raises:
        UserError: if a sample text has other tokens.
    """
    for text in samples.texts:
        if found(text)["input_ids"] != expected(text)["input_ids"]:
            raise UserError(
                f"the saved tokenizer splits {text[:60]!r} otherwise than the trained model's; "
                "nothing was exported"
            )
