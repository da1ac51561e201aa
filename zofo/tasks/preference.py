"""Preference pairs: two answers to a prompt, one of them preferred, and the loss of their margin.

    margin = (log π(chosen) − log π_ref(chosen)) − (log π(rejected) − log π_ref(rejected))
    loss   = −log sigmoid(beta · margin)

log π(answer) is the sum over the answer's tokens, and π_ref the model before training. A row has
the columns of TRL's preference layout: prompt, chosen and rejected, each a text or chat messages.
Without a prompt, both answers begin with it.

References:
    Rafailov et al., "Direct Preference Optimization", 2023, equation 7.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from zofo.errors import UserError
from zofo.tasks.encode import Encoded, Encoder, NothingToLearnError
from zofo.tasks.generate import chat_in, conversation, require_template
from zofo.tasks.losses import token_scores
from zofo.tasks.rows import Table, convert_rows, require_columns, text_in
from zofo.tasks.spec import Chat, Completion
from zofo.tasks.whole_text import common

COLUMNS: Final = ("prompt", "chosen", "rejected")


@dataclass(kw_only=True)
class PreferenceOptions:
    """How preference pairs are compared."""

    beta: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description="weight of the margin in the loss (DPO: 0.1)"),
    ] = 0.1
    batch_size: Annotated[int, Field(ge=1, description="pairs per micro-batch")] = 8
    max_length: Annotated[
        int | None,
        Field(
            ge=8,
            description="tokens of a prompt with an answer; default: task.max_length, or 1024 in a "
            "script",
        ),
    ] = None


@dataclass(frozen=True)
class Pair:
    """Two completions of a prompt, and the number of their row, from 1."""

    chosen: Completion
    rejected: Completion
    row: int


def read_pairs(table: Table, tokenizer: Any, columns: tuple[str, str, str] = COLUMNS) -> list[Pair]:
    """One pair a row.

    Args:
        table: the rows.
        tokenizer: has a chat template, if the rows hold messages.
        columns: of the prompt, which may be missing, the chosen and the rejected answer.

    Raises:
        UserError: for a missing column, bad rows, or a tokenizer without a chat template.
    """
    _, *answers = columns
    require_columns(table, answers, "Name yours with preference.chosen and preference.rejected")
    if not isinstance(table.rows[0][1][answers[0]], str):
        require_template(tokenizer)

    def convert(number: int, row: dict[str, Any]) -> Pair:
        if isinstance(row.get(answers[0]), str):
            return _of_texts(row, columns, number)
        return _of_messages(row, columns, table.source, number, tokenizer)

    return convert_rows(table, convert)


def _of_texts(row: dict[str, Any], columns: tuple[str, str, str], number: int) -> Pair:
    prompt, *answers = columns
    texts = [text_in(row, column) for column in answers]
    if row.get(prompt) is not None:
        before = text_in(row, prompt)
    else:
        # The last word may only begin alike, and its blank belongs to the answer.
        before = re.sub(r"\s*\S*\Z", "", texts[0][: common(*texts)])
        if not before:
            raise ValueError(
                f"it has no {prompt!r}, and {answers[0]!r} and {answers[1]!r} begin differently; "
                "give the prompt in a column of its own"
            )
        texts = [text[len(before) :] for text in texts]
    chosen, rejected = (
        Completion(((before, False), (text, True)), before + text, number) for text in texts
    )
    return Pair(chosen, rejected, number)


def _of_messages(
    row: dict[str, Any], columns: tuple[str, str, str], source: str, number: int, tokenizer: Any
) -> Pair:
    prompt, *answers = columns
    chats = [chat_in(row, column, source=source) for column in answers]
    messages = [list(chat.messages) for chat in chats]
    if all(found[0]["role"] == "assistant" for found in messages):
        before = list(chat_in(row, prompt, source=source, must_end_with_answer=False).messages)
    else:  # whole conversations
        num = 0
        while num < min(map(len, messages)) - 1 and messages[0][num] == messages[1][num]:
            num += 1
        before = messages[0][:num]
        messages = [found[num:] for found in messages]
    chosen, rejected = (
        conversation(before, Chat(found, chats[0].tools), number, tokenizer) for found in messages
    )
    return Pair(chosen, rejected, number)


def encode_pairs(encoder: Encoder, pairs: Sequence[Pair]) -> tuple[list[Encoded], tuple[str, ...]]:
    """Encode pairs, each as an example with two candidates: chosen and rejected.

    Returns:
        The pairs, and a note if some are left out, because an answer is too long or both are equal.

    Raises:
        UserError: if none is left.
    """
    found: list[Encoded] = []
    problems: list[str] = []
    for pair in pairs:
        try:
            chosen, rejected = encoder(pair.chosen), encoder(pair.rejected)
        except NothingToLearnError as error:
            problems.append(str(error))
            continue
        if (chosen.rows, chosen.outputs) == (rejected.rows, rejected.outputs) and (
            chosen.targets == rejected.targets
        ):
            problems.append(f"row {pair.row}: its two answers are the same")
            continue
        tail = tuple((row + 1, place, token) for row, place, token in rejected.targets[0])
        found.append(
            Encoded(
                (*chosen.rows, *rejected.rows),
                (chosen.targets[0], tail),
                0,
                outputs=(*chosen.outputs, *rejected.outputs),
            )
        )
    if not found:
        raise UserError(
            f"none of the {len(pairs)} preference pairs can be used: {problems[0]}"
            if problems
            else "there are no preference pairs; give at least one row"
        )
    note = f"preference pairs left out: {len(problems)}. The first: {(problems or [''])[0]}"
    return found, (note,) if problems else ()


def pair_log_likelihoods(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log-likelihoods of both answers, float64 [pairs, 2]: chosen, rejected."""
    scores = token_scores(model, batch).log_likelihood.double()
    sums = scores.new_zeros(len(batch["candidate"]))
    return sums.index_add(0, batch["token_candidate"], scores).view(-1, 2)


@dataclass(frozen=True)
class Compared:
    """Pairs under a model and under its reference.

    Attributes:
        now: log-likelihoods, [pairs, 2]: chosen, rejected.
        reference: those of the model before training.
        beta: as in `PreferenceOptions`.
    """

    now: Tensor
    reference: Tensor
    beta: float

    @property
    def margins(self) -> Tensor:
        """How much the model prefers the chosen answers more than before, in nats: [pairs]."""
        gains = self.now - self.reference
        return gains[:, 0] - gains[:, 1]

    @property
    def losses(self) -> Tensor:
        """The loss of each pair: [pairs]."""
        return -functional.logsigmoid(self.beta * self.margins)

    def figures(self) -> dict[str, float]:
        """Means over the pairs, for a log."""
        found = {
            "loss": self.losses,
            "margin": self.margins,
            "margin_above_0": (self.margins > 0).double(),
            "ranked_right": (self.now[:, 0] > self.now[:, 1]).double(),
        }
        return {f"preference_{name}": float(torch.mean(x)) for name, x in found.items()}
