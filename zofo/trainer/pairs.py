"""Preference pairs whose margin the zeroth-order block follows.

    source = PairSource(rows, tokenizer, PreferenceOptions(beta=0.1), seed=0)
    source.measure_reference(model)
    optimizer.step(zeroth_loss=lambda: source.loss(model, step))

`zofo.tasks.preference` gives the loss. Its value at the perturbed weights suffices, so neither a
gradient nor a second model is needed: the reference is two numbers for each pair, measured before
training. The model runs in evaluation mode, in which the reference was measured too. Which pairs a
step has is a pure function of the seed and of the step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zofo.disk.files import bytes_digest, read_tensors, write_tensors
from zofo.errors import UserError
from zofo.optim.reshuffle import Turns
from zofo.optim.zeroth_loss import ZerothLoss
from zofo.rewards.options import checked
from zofo.tasks.encode import Collator, Encoder
from zofo.tasks.encode_rows import check_limits
from zofo.tasks.preference import (
    COLUMNS,
    Compared,
    PreferenceOptions,
    encode_pairs,
    pair_log_likelihoods,
    read_pairs,
)
from zofo.tasks.rows import Table

_MAX_LENGTH = 1024  # TRL's
Context = Callable[[], AbstractContextManager[Any]]


class PairSource:
    """Turns preference pairs into losses of the zeroth-order block.

    Args:
        rows: each a mapping with the keys prompt, chosen and rejected, texts or lists of chat
            messages; the prompt may be missing if both answers begin with it.
        tokenizer: the model's tokenizer.
        options: how pairs are compared.
        seed: seed of the order of the pairs.
        head: "causal-lm" or "seq2seq".
        columns: the names of the three keys.

    Attributes:
        pairs: the encoded pairs, each with the candidates chosen and rejected.
        notes: on pairs that are left out.
        reference: log-likelihoods before training, float64 [pairs, 2]; NaN: not measured.
        last: the pairs of the newest micro-batch, as they were first evaluated.

    Raises:
        UserError: for missing columns, bad rows or wrong options, or if no pair can be used.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]] | Table,
        tokenizer: Any,
        options: PreferenceOptions | None = None,
        *,
        seed: int = 0,
        head: str = "causal-lm",
        columns: tuple[str, str, str] = COLUMNS,
    ) -> None:
        self.options = options = checked(options or PreferenceOptions())
        if not isinstance(rows, Table):
            numbered = [(i, dict(row)) for i, row in enumerate(rows, start=1)]
            rows = Table(numbered, "the preference pairs", {})
        if not rows.rows:
            raise UserError("there are no preference pairs; give at least one row")
        if getattr(tokenizer, "pad_token_id", None) is None:
            raise UserError(
                "preference pairs need the model's tokenizer, with a padding token; pass "
                "processing_class=tokenizer, and set tokenizer.pad_token if it has none"
            )
        self.tokenizer = tokenizer
        encoder = Encoder(tokenizer, head=head, max_length=options.max_length or _MAX_LENGTH)
        self.pairs, self.notes = encode_pairs(encoder, read_pairs(rows, tokenizer, columns))
        self.reference = torch.full((len(self.pairs), 2), torch.nan, dtype=torch.float64)
        self.last: Compared | None = None
        self._collate = Collator(tokenizer.pad_token_id)
        self._turns = Turns(len(self.pairs), options.batch_size, seed)

    def check(self, model: Any) -> None:
        """Raise UserError if the model cannot read the pairs."""
        check_limits(
            model,
            self.tokenizer,
            [ids for pair in self.pairs for ids in pair.rows],
            outputs=[ids for pair in self.pairs for ids in pair.outputs],
        )

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens of both answers with their prompts."""
        return sum(len(ids) for pair in self.pairs for ids in pair.rows) / len(self.pairs)

    def used(self, num_batches: int | None = None) -> list[int]:
        """The pairs of the first micro-batches; None: all."""
        return (
            list(range(len(self.pairs))) if num_batches is None else self._turns.first(num_batches)
        )

    def measure_reference(
        self, model: Any, num_batches: int | None = None, *, context: Context = nullcontext
    ) -> None:
        """Take the model as it is as the reference.

        Args:
            model: the model before training.
            num_batches: micro-batches that training will have; pairs beyond them are not measured.
            context: makes what stands around the model's calls, such as autocast.
        """
        self.reference.fill_(torch.nan)
        used = self.used(num_batches)
        self.reference[used] = self._evaluated(model, used, context)

    def loss(
        self,
        model: Any,
        number: int,
        *,
        weight: float = 1.0,
        tokens_per_forward: int | None = None,
        context: Context = nullcontext,
    ) -> ZerothLoss:
        """The loss of a micro-batch of pairs, with a share for each pair.

        Args:
            model: the model, which runs in evaluation mode.
            number: number of the micro-batch in the run, from 0.
            weight: factor of the loss, 1 / n with n micro-batches per step.
            tokens_per_forward: tokens of one forward-equivalent; None: those of the pairs.
            context: as for `measure_reference`.

        Raises:
            UserError: if the reference of a pair was not measured.
        """
        rows = self._turns(number)
        reference = self.reference[rows]
        if reference.isnan().any():
            raise UserError(
                f"the reference of the pairs of micro-batch {number} was not measured: call "
                "measure_reference(model) before training, and resume with the same number of steps"
            )
        batch = self._batch(model, rows)
        is_seen = False

        def closure() -> Tensor:
            nonlocal is_seen
            now = self._log_likelihoods(model, batch, context)
            found = Compared(now, reference.to(now.device), self.options.beta)
            if not is_seen:
                is_seen, self.last = True, replace(found, now=now.detach())
            return found.losses * (weight / len(rows))

        num_tokens = batch["input_ids"].numel()
        examples = torch.arange(len(rows)).repeat_interleave(2)
        return ZerothLoss(closure, num_tokens / (tokens_per_forward or num_tokens), None, examples)

    def compare(self, model: Any, *, context: Context = nullcontext) -> Compared:
        """All pairs under a model, whose reference was measured."""
        now = self._evaluated(model, range(len(self.pairs)), context)
        return Compared(now, self.reference, self.options.beta)

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the tokens of all pairs."""
        tokens = [ids for pair in self.pairs for ids in (*pair.rows, (-1,), *pair.outputs, (-2,))]
        return bytes_digest(np.concatenate([np.asarray(ids, np.int64) for ids in tokens]).tobytes())

    def save_reference(self, path: Path) -> None:
        """Write the reference, for a run that continues."""
        write_tensors(path, {"reference": self.reference}, {"pairs": self.digest})

    def load_reference(self, path: Path) -> None:
        """Read the reference.

        Raises:
            UserError: if it is missing or damaged, or belongs to other pairs.
        """
        tensors, about = read_tensors(path)
        found = tensors.get("reference")
        if about.get("pairs") != self.digest or found is None:
            raise UserError(
                f"{path} belongs to other preference pairs; continue the run with those that it "
                "began with"
            )
        if found.shape != self.reference.shape or found.dtype != torch.float64:
            raise UserError(f"{path} is damaged; resume from another checkpoint")
        self.reference = found

    def _batch(self, model: Any, rows: Sequence[int]) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        batch = self._collate([self.pairs[row] for row in rows])
        return {name: tensor.to(device) for name, tensor in batch.items()}

    @torch.no_grad()
    def _evaluated(self, model: Any, rows: Sequence[int], context: Context) -> Tensor:
        """Log-likelihoods of pairs, [pairs, 2] on the CPU."""
        size = self.options.batch_size
        parts = (self._batch(model, rows[i : i + size]) for i in range(0, len(rows), size))
        return torch.cat([self._log_likelihoods(model, part, context).cpu() for part in parts])

    def _log_likelihoods(self, model: Any, batch: dict[str, Tensor], context: Context) -> Tensor:
        was_training = model.training
        model.eval()
        try:
            with context():
                return pair_log_likelihoods(model, batch)
        finally:
            model.train(was_training)
