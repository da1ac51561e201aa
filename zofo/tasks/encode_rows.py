"""Encodes all rows of a task, and checks that the model can read them.

A row that has nothing to learn is left out, with a note. Token ids and positions beyond the tables
of a model would end a run with an error of torch, and on a GPU without a message.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from zofo.errors import UserError
from zofo.models.sequence_limits import can_read, limits_of
from zofo.tasks.encode import Encoded, Encoder, NothingToLearnError
from zofo.tasks.spec import Splits

_NEED: Final = {
    "train": "Without them nothing can be learnt",
    "dev": "They are scored during training; give other rows as task.dev, or more by task.num_dev",
    "test": "They measure the result; give other rows as task.test, more by task.num_test, or set "
    "measure_test=false",
}
"""Part -> what its rows are for, and what to do without them."""


def encode_parts(
    encoder: Encoder,
    splits: Splits,
    model: Any,
    parts: Sequence[str] = ("train", "dev", "test"),
    *,
    may_be_empty: Sequence[str] = (),
) -> tuple[dict[str, list[Encoded]], tuple[str, ...]]:
    """Encode parts of a task's rows.

    Args:
        encoder: encodes a row.
        splits: the rows.
        model: the model with its adapter.
        parts: names of the parts.
        may_be_empty: parts that nothing will read.

    Returns:
        Part -> encoded rows. Notes on rows that were left out or shortened, or are longer than
        those the model was trained on.

    Raises:
        UserError: if no row of a part that is needed is left, or if the model cannot read a row.
    """
    encoded: dict[str, list[Encoded]] = {}
    left_out: list[str] = []
    for part in parts:
        encoded[part], problems = [], []
        for row in splits.part(part):
            try:
                encoded[part].append(encoder(row))
            except NothingToLearnError as error:
                problems.append(str(error))
        if not encoded[part] and part not in may_be_empty:
            raise UserError(
                f"none of the {len(problems)} {part} rows can be used: {problems[0]}. {_NEED[part]}"
            )
        left_out += [f"{part} {problem}" for problem in problems]
    rows = [row for part in parts for row in encoded[part]]
    notes = []
    if left_out:
        notes.append(f"rows left out: {len(left_out)}. The first: {left_out[0]}")
    num_short = sum(row.is_shortened for row in rows)
    if num_short:
        notes.append(
            f"{num_short} of {len(rows)} conversations are longer than task.max_length "
            f"({encoder.max_length} tokens) and lose their first turns"
        )
    sequences = [ids for row in rows for ids in row.rows]
    outputs = [ids for row in rows for ids in row.outputs]
    return encoded, (*notes, *check_limits(model, encoder.tokenizer, sequences, outputs=outputs))


def check_limits(
    model: Any,
    tokenizer: Any,
    sequences: Iterable[Sequence[int]],
    *,
    outputs: Iterable[Sequence[int]] = (),
    max_new_tokens: int = 0,
) -> list[str]:
    """Compare sequences of token ids with the limits of a model.

    Args:
        model: the model with its adapter.
        tokenizer: its tokenizer.
        sequences: token ids of each sequence.
        outputs: those that the decoder of an encoder-decoder writes.
        max_new_tokens: tokens that are generated after each.

    Returns:
        A note if the sequences are longer than those the model was trained on.

    Raises:
        UserError: if the model cannot read them.
    """
    limits, inputs, written = limits_of(model), list(sequences), list(outputs)
    highest = max(max(ids, default=0) for ids in [*inputs, *written, [tokenizer.pad_token_id]])
    if limits.num_tokens is not None and highest >= limits.num_tokens:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise UserError(
            f"the tokenizer gives {token!r} the id {highest}, and the model has embeddings for ids "
            f"below {limits.num_tokens} only: call model.resize_token_embeddings(len(tokenizer)) "
            "and save both, or use the tokenizer without the added tokens"
        )
    num_read = max(map(len, inputs)) + max_new_tokens
    num_written = max(map(len, written), default=0)
    longest = max(num_read, num_written) + limits.virtual
    if limits.positions is None or longest <= limits.positions:
        return []
    what = f"the longest row has {longest} tokens"
    if limits.virtual:
        what += f", of them {limits.virtual} virtual ones of the adapter"
    if max_new_tokens:
        what += f" with {max_new_tokens} to be written"
    can = can_read(model, num_read, num_written)
    if not can if can is not None else limits.is_hard:
        room = limits.positions - limits.virtual - max_new_tokens
        remedy = (
            f"set task.max_length={room} (predict takes it with --set)"
            if room >= 8
            else "choose another model"
        )
        if max_new_tokens:
            remedy = "shorten it, or lower max_new_tokens (--max-new-tokens)"
        raise UserError(f"{what}, and the model has {limits.positions} positions; {remedy}")
    return [f"{what}, and the model was made for {limits.positions} positions"]
