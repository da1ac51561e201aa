"""Generates text after prompts, greedily or at a temperature, with the model's own `generate`.

Prompts of a decoder are padded on the left, because `generate` counts positions from the first real
token. Prompts of an encoder are padded on the right. With prompt tuning, PEFT also counts the
padding, so only prompts of equal length share a batch. In each case a text is independent of the
other rows of its batch, up to rounding.

At a temperature, a row takes the token with the largest logit / temperature + Gumbel noise, which
is a draw from the softmax. The noise of a row comes from a generator of its own, so its text does
not depend on the other rows either.

Deviation from MeZO's protocol, which stops at a line break or the end token: a line break also
counts in the middle of a token.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from zofo.tasks.losses import virtual_tokens
from zofo.tasks.spec import TaskSpec


@dataclass(frozen=True)
class Written:
    """Generated texts.

    Attributes:
        texts: one text per prompt, in the order of the prompts.
        num_tokens: tokens that the model processed, padding included.
    """

    texts: tuple[str, ...]
    num_tokens: int


@dataclass(frozen=True)
class Writer:
    """Generates texts with a model.

    Attributes:
        tokenizer: the model's tokenizer.
        max_new_tokens: most tokens of a text.
        one_line: a text ends at a line break, and surrounding blanks are removed.
        ends: tokens that end a text, besides the end tokens of tokenizer and model.
        temperature: of the draws; 0 for the most likely token.
    """

    tokenizer: Any
    max_new_tokens: int
    one_line: bool = False
    ends: tuple[int, ...] = ()
    temperature: float = 0.0

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> Written:
        """Generate a text after each prompt; the model runs in evaluation mode.

        Args:
            model: the model, on its device.
            prompts: token ids of each prompt, at least one.
            batch_size: prompts per batch.
            progress: called with the number of prompts just done.
        """
        texts = [""] * len(prompts)
        num_tokens = 0
        was_training = model.training
        model.eval()
        try:
            for indices in batches_of(model, prompts, batch_size):
                written = self.write_batch(model, [prompts[i] for i in indices])
                for i, text in zip(indices, written.texts, strict=True):
                    texts[i] = text
                num_tokens += written.num_tokens
                if progress is not None:
                    progress(len(indices))
        finally:
            model.train(was_training)
        return Written(tuple(texts), num_tokens)

    @torch.no_grad()
    def write_batch(
        self, model: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int] = ()
    ) -> Written:
        """Generate the texts of one batch, whose rows the model sees in this order.

        Args:
            model: the model, on its device and in evaluation mode.
            prompts: token ids of each prompt, of one length if the model has virtual tokens.
            seeds: one for each row, in [0, 2^63), at a temperature above 0.
        """
        device = next(model.parameters()).device
        length = max(map(len, prompts))
        ids = torch.full((len(prompts), length), self.tokenizer.pad_token_id)  # [prompts, tokens]
        mask = torch.zeros_like(ids)
        is_read_by_encoder = bool(model.config.is_encoder_decoder)
        for i, prompt in enumerate(prompts):
            start = 0 if is_read_by_encoder else length - len(prompt)
            ids[i, start : start + len(prompt)] = torch.tensor(prompt)
            mask[i, start : start + len(prompt)] = 1
        ends = self._end_tokens(model)
        processors = LogitsProcessorList()
        if self.temperature > 0:
            processors.append(_GumbelNoise(self.temperature, seeds, device))
        stop = StoppingCriteriaList([_LineBreak(self.tokenizer)] if self.one_line else [])
        with warnings.catch_warnings():
            # PEFT ignores given position ids, which is harmless without padding.
            warnings.filterwarnings("ignore", "Position ids are not supported")
            written = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=ends or None,
                logits_processor=processors,
                stopping_criteria=stop,
            ).cpu()
        # A decoder's output begins with the prompt, but some adapters' `generate` cuts it off.
        if is_read_by_encoder:
            written = written[:, 1:]  # the start token of the decoder
        elif torch.equal(written[:, :length], ids):
            written = written[:, length:]
        num_forwards = max(1, written.shape[1])
        cost = len(prompts) * (length + num_forwards - 1)  # earlier tokens are kept in the cache
        return Written(tuple(self._text(row.tolist(), ends) for row in written), cost)

    def _end_tokens(self, model: Any) -> list[int]:
        # Chat models may have several end tokens, of which the tokenizer knows only one.
        known = getattr(model.generation_config, "eos_token_id", None)
        known = known if isinstance(known, list) else [known]
        found = [self.tokenizer.eos_token_id, *known, *self.ends]
        return list(dict.fromkeys(int(token) for token in found if token is not None))

    def _text(self, ids: list[int], ends: Sequence[int]) -> str:
        kept = list(itertools.takewhile(lambda token: token not in ends, ids))
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        return text.split("\n")[0].strip() if self.one_line else text


def writer_for(tokenizer: Any, spec: TaskSpec) -> Writer:
    """The writer of a task's answers."""
    return Writer(tokenizer, spec.max_new_tokens, one_line=True)


class _LineBreak(StoppingCriteria):
    """A row is done when its newest token breaks the line."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        newest = input_ids[:, -1].tolist()
        done = ["\n" in self.tokenizer.decode([token]) for token in newest]
        return torch.tensor(done, device=input_ids.device)


class _GumbelNoise(LogitsProcessor):
    """Adds noise to the scaled logits, whose largest is then a draw from their softmax."""

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        noise = torch.stack(
            [
                torch.rand(scores.shape[1], generator=generator, device=scores.device)
                for generator in self.generators
            ]
        )  # [rows, vocabulary]
        tiny = torch.finfo(noise.dtype).tiny
        return scores / self.temperature - noise.clamp(min=tiny).log().neg().clamp(min=tiny).log()


def batches_of(model: Any, prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices of the prompts by batch, longest first, so that a lack of memory shows at once."""
    one_length = virtual_tokens(model) > 0
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = []
    for _, equal in itertools.groupby(order, key=lambda i: len(prompts[i]) if one_length else 0):
        group = list(equal)
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return batches
