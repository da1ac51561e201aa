"""Check that an exported folder gives the logits of the trained model.

    deviation = max |exported − trained| / max |trained|

The maxima are over the last positions of a few inputs. The tolerance is the larger of those of the
dtypes of base and export. The last column is the deviation of SmolLM2-135M with a merged LoRA.

    dtype              tolerance   source of the error                          measured
    float64, float32   1e-4        one rounding per weight, order of the sums   2e-6
    float16            2e-2        rounding to 10 bits of mantissa              6e-3
    bfloat16           1e-1        rounding to 7 bits of mantissa               3e-2

A wide tolerance could hide an error. Therefore the merge is checked in float32 before rounding, and
every weight on disk must equal the rounded weight bit for bit.
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
    """Inputs on which two models are compared."""

    inputs: tuple[tuple[int, ...], ...]  # token ids of each input
    texts: tuple[str, ...]  # texts on which the tokenizers are compared
    origin: str  # description of the inputs


@dataclass(frozen=True)
class Deviation:
    """The difference between the logits a and b of two models."""

    largest: float  # max |a − b|
    scale: float  # max |b|

    @property
    def share(self) -> float:
        """The largest difference as a share of the largest logit."""
        return self.largest / self.scale if self.scale else self.largest

    def within(self, tolerance: float) -> bool:
        """Whether the share is at most the tolerance; False for NaN."""
        return self.share <= tolerance


def tolerance_of(*dtypes: str) -> float:
    """The largest of the dtypes' tolerances."""
    return max(TOLERANCES[dtype] for dtype in dtypes)


def sample_inputs(source: Source, model: Any, tokenizer: Any, *, seed: int = 0) -> Samples:
    """Test rows of the task; random tokens of the vocabulary if its data cannot be read."""
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
        except (UserError, OSError, ValueError):  # The data may have been moved since training.
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
    # Either may be larger: models pad their vocabulary, and users add tokens to a tokenizer.
    num_tokens = min(len(tokenizer), len(model.get_input_embeddings().weight))
    ids = torch.randint(num_tokens, (NUM_INPUTS, _RANDOM_LENGTH), generator=generator)
    texts = tuple(tokenizer.decode(row) for row in ids)
    return Samples(
        tuple(tuple(row) for row in ids.tolist()), texts, f"{NUM_INPUTS} rows of random tokens"
    )


@torch.no_grad()
def logits_of(model: nn.Module, samples: Samples) -> list[Tensor]:
    """Logits of each input on the CPU: float32 [last positions, vocabulary] or [classes]."""
    device = next(model.parameters()).device
    found = []
    for row in samples.inputs:
        ids = torch.tensor([row], device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids  # The comparison works with any tokens.
        logits = model(**inputs).logits[0]  # [positions, vocabulary] or [classes]
        last = logits[-_NUM_POSITIONS:] if logits.ndim == 2 else logits
        found.append(last.float().cpu().clone())
    return found


def deviation(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Deviation:
    """The difference between the logits of two models on the same inputs."""
    # torch's max keeps NaN, which Python's max may drop.
    largest = torch.stack([(a - b).abs().max() for a, b in zip(found, expected, strict=True)])
    scale = torch.stack([b.abs().max() for b in expected])
    return Deviation(float(largest.max()), float(scale.max()))


def digests_of(model: nn.Module) -> dict[str, tuple[torch.dtype, str]]:
    """Name -> dtype and digest of every tensor in the state of a model, for `check_weights`."""
    return {name: (t.dtype, fingerprint({"": t})) for name, t in model.state_dict().items()}


def check_weights(found: nn.Module, expected: Mapping[str, tuple[torch.dtype, str]]) -> None:
    """Compare a model that was read with `digests_of` the model that was written.

    Raises:
        UserError: if a tensor is missing, differs in a bit, or holds NaN.
    """
    loaded = found.state_dict()
    for name, (dtype, digest) in expected.items():
        other = loaded.get(name)
        # Some models keep certain weights in float32 whatever dtype the file has.
        other = None if other is None else other.to(dtype)
        if other is None or fingerprint({"": other}) != digest or bool(other.isnan().any()):
            raise UserError(
                f"the weight {name!r} was read differently from how it was written, or it is NaN "
                "in this dtype; nothing was exported. Try dtype float32"
            )


def check_tokenizers(found: Any, expected: Any, samples: Samples) -> None:
    """Raise a `UserError` if two tokenizers give different tokens for a sample text."""
    for text in samples.texts:
        if found(text)["input_ids"] != expected(text)["input_ids"]:
            raise UserError(
                f"the saved tokenizer splits {text[:60]!r} differently from the tokenizer of the "
                "trained model; nothing was exported"
            )
