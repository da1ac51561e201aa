"""Tokens of a whole text, and where in them each part of the text begins.

A text is always encoded as a whole. Parts that are encoded apart may have other tokens: some
tokenizers put a blank before every text, join the end of one part and the beginning of the next in
one token, or end every text. A token that straddles a border belongs to the learnt part.

A fast tokenizer gives the characters of each token. For another one, a part begins where the tokens
of the whole text differ from those of the text before the part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Segments = tuple[tuple[str, bool], ...]
"""Parts of a text in order, and whether the model learns to write each."""


class WholeText:
    """Encodes texts with a tokenizer.

    Attributes:
        begin: tokens that the tokenizer puts before every text, such as [CLS].
        end: tokens that it puts after every text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        empty, some = self.ids(""), self.ids("a")
        self.begin = empty[: common(empty, some)]
        self.end = empty[len(self.begin) :]

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, with or without the tokens that the tokenizer puts around it."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def open_ids(self, text: str) -> list[int]:
        """Token ids of a text that will be continued, so without the end."""
        ids = self.ids(text)
        return ids[: -len(self.end)] if self.end and ids[-len(self.end) :] == self.end else ids

    def joined(self, before: str, after: str) -> tuple[list[int], int]:
        """Token ids of two texts in a row, and the index of the first token of the second."""
        ids, first, _ = self._borders(before + after, special=True)
        return ids, first(len(before))

    def learnt(self, segments: Segments, *, special: bool) -> tuple[list[int], list[bool]]:
        """Token ids of the segments in a row, and which of them the model learns to write."""
        ids, first, end = self._borders("".join(text for text, _ in segments), special=special)
        learnt, place = [False] * len(ids), 0
        for text, is_learnt in segments:
            place += len(text)
            if is_learnt and text:
                begin, stop = first(place - len(text)), end(place)
                learnt[begin:stop] = [True] * (stop - begin)
        return ids, learnt

    def num_leading(self, ids: Sequence[int]) -> int:
        """The number of special tokens with which a sequence begins."""
        start = self.tokenizer.bos_token_id
        return max(common(self.begin, ids), int(start is not None and list(ids[:1]) == [start]))

    def cut(self, ids: list[int], room: int) -> list[int]:
        """Drop tokens after the leading special ones, until at most `room` are left."""
        excess = len(ids) - room
        lead = min(self.num_leading(ids), room)
        return ids if excess <= 0 else ids[:lead] + ids[lead + excess :]

    def _borders(
        self, text: str, *, special: bool
    ) -> tuple[list[int], Callable[[int], int], Callable[[int], int]]:
        """Token ids; character -> index of the first token that reaches beyond, or begins there."""
        if not getattr(self.tokenizer, "is_fast", False):
            ids = self.ids(text, special=special)

            def index(place: int) -> int:
                is_whole = place == len(text)
                return (
                    len(ids) if is_whole else common(self.ids(text[:place], special=special), ids)
                )

            return ids, index, index
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        spans = encoded["offset_mapping"]

        def first(place: int) -> int:
            return next((i for i, (_, end) in enumerate(spans) if end > place), len(spans))

        # Some tokenizers leave blanks out of the span of a token, so that the span may be empty.
        def end(place: int) -> int:
            later = (i for i, (start, end) in enumerate(spans) if start >= place < end)
            return next(later, len(spans))

        return list(encoded["input_ids"]), first, end


def common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
