"""Turns examples into tokens and batches, from which `zofo.tasks.losses` computes the loss.

    score(candidate) = mean over its tokens of log p(token | the tokens before it)
    candidates:  loss = −log softmax(scores)[gold]
    gold:        loss = −score(gold);  for completions, the mean over all target tokens of a batch

Logits are computed only at scored positions, and converted to float32 there. Rows are padded on the
right, so that the scores of a row do not depend on the other rows of the batch.

A sequence has the tokens of its whole text (`zofo.tasks.whole_text`). A sequence that is too long
loses tokens after its leading special ones; a conversation loses its first turns.

An encoder-decoder reads the prompt in the encoder. Its decoder scores the candidate and its end
token, so that a score is minus transformers' loss with that candidate as labels.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zofo.errors import UserError
from zofo.tasks.answers import Answers
from zofo.tasks.generate import rendered, segments_of
from zofo.tasks.spec import Completion, Example, TaskSpec
from zofo.tasks.whole_text import WholeText, common


class NothingToLearnError(UserError):
    """A row has nothing that the model could learn; the other rows are not affected."""


@dataclass(frozen=True)
class Encoded:
    """One example in tokens.

    Attributes:
        rows: token ids of each sequence to run; for an encoder-decoder, the encoder's input.
        targets: the tokens that score each candidate: (row, position of the logit, token).
        gold: index of the right candidate.
        types: segment (0 or 1) of each token of a pair of texts, if the tokenizer gives it.
        prompt: token ids after which the model generates an answer; empty for other tasks.
        answers: the gold answers to compare the generated one with.
        outputs: token ids of the decoder's output for each row of an encoder-decoder.
        is_shortened: the first turns of a conversation are missing.
    """

    rows: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[tuple[int, int, int], ...], ...]
    gold: int
    types: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    answers: Answers | None = None
    outputs: tuple[tuple[int, ...], ...] = ()
    is_shortened: bool = False

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, (*self.rows, *self.outputs)))


class Encoder:
    """Turns a task's rows into tokens.

    Args:
        tokenizer: the model's tokenizer.
        head: "causal-lm", "seq2seq" or "classification".
        max_length: most tokens of a sequence. A long prompt loses its beginning, a conversation its
            first turns, the text of an encoder its end.
        max_new_tokens: tokens of `max_length` that stay free for a generated answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        head: str = "causal-lm",
        max_length: int = 256,
        max_new_tokens: int = 0,
    ) -> None:
        self.tokenizer, self.head = tokenizer, head
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.whole = WholeText(tokenizer)
        self._unknown: dict[str, bool] = {}

    def __call__(self, example: Example | Completion) -> Encoded:
        """Encode one row.

        Raises:
            NothingToLearnError: if its candidate or completion alone is longer than `max_length`.
            UserError: if two candidates have the same tokens, or one is unknown to the tokenizer.
        """
        if self.head == "classification":
            if isinstance(example, Completion):
                raise UserError("an encoder with a classification head writes no completions")
            return self._texts(example)
        if self.head == "seq2seq":
            return self._outputs(example)
        if isinstance(example, Completion):
            return self._completion(example)
        return self._endings(example) if example.ending else self._candidates(example)

    def _texts(self, example: Example) -> Encoded:
        """Encode a text, or a pair of texts; truncation shortens the longer text of a pair."""
        is_pair = not isinstance(example.text, str)
        texts = example.text if is_pair else (example.text,)
        ids = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        types = tuple(ids.get("token_type_ids", ())) if is_pair else ()
        return Encoded((tuple(ids["input_ids"]),), (), example.gold, types)

    def prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt after which the model generates an answer."""
        if self.head == "seq2seq":  # the encoder reads it, and the decoder has room of its own
            return tuple(self.whole.cut(self.whole.ids(text) or self._start(), self.max_length))
        ids = self.whole.open_ids(text) or self._start()
        return tuple(self.whole.cut(ids, max(1, self.max_length - self.max_new_tokens)))

    def _start(self) -> list[int]:
        """The token before the first target token if there is no prompt."""
        start = self.tokenizer.bos_token_id
        return [self.tokenizer.eos_token_id if start is None else start]

    def _candidates(self, example: Example) -> Encoded:
        joined = [self.whole.joined(example.prompt, text) for text in example.candidates]
        full = [ids for ids, _ in joined]
        # All candidates are scored from the first token that belongs to one of them.
        shared = min(min(begin, common(full[0], ids)) for ids, begin in joined)
        if shared == 0:  # the first token needs a token before it whose logits score it
            full = [self._start() + ids for ids in full]
            shared = 1
        if any(len(ids) <= shared for ids in full):
            raise UserError(
                f"row {example.row}: the candidate {min(example.candidates, key=len)!r} adds no "
                "token to the prompt; write it out in task.verbalizers"
            )
        tails = [ids[shared:] for ids in full]
        self._require_different(example, tails)
        head = self._shorten(full[0][:shared], max(map(len, tails)), example.row)
        # The logits after the prompt score all candidates of one token, so one sequence suffices.
        if all(len(tail) == 1 for tail in tails):
            targets = tuple(((0, len(head) - 1, tail[0]),) for tail in tails)
            return Encoded((tuple(head),), targets, example.gold)
        return _continued([head] * len(tails), tails, example.gold)

    def _endings(self, example: Example) -> Encoded:
        """Encode one sequence per candidate and score the ending that all sequences share."""
        joined = [
            self.whole.joined(example.prompt + candidate, example.ending)
            for candidate in example.candidates
        ]
        full, tails = [ids for ids, _ in joined], [ids[begin:] for ids, begin in joined]
        self._require_different(example, full)
        num = min(common(tails[0][::-1], tail[::-1]) for tail in tails)
        if num == 0:
            raise UserError(
                f"row {example.row}: {example.ending!r} has other tokens after each candidate; "
                "begin it with a blank"
            )
        # A tokenizer may put the end of a candidate and the beginning of the ending in one token.
        # Only the tokens that all endings share are scored, so that every candidate has the same.
        heads = [self._shorten(ids[:-num] or self._start(), num, example.row) for ids in full]
        return _continued(heads, [full[0][-num:]] * len(heads), example.gold)

    def _completion(self, example: Completion) -> Encoded:
        ids, learnt = self._learnt(example)
        is_shortened = example.chat is not None and len(ids) > self.max_length
        if is_shortened:
            ids, learnt = self._learnt(self._without_first_turns(example))
        excess = max(0, len(ids) - self.max_length)
        if excess:
            lead = self.whole.num_leading(ids)
            ids, rest = self.whole.cut(ids, self.max_length), learnt[lead + excess :]
            # The rest of an answer whose beginning is lost is not learnt.
            num_lost = next((i for i, is_learnt in enumerate(rest) if not is_learnt), len(rest))
            learnt = [*learnt[:lead], *[False] * num_lost, *rest[num_lost:]]
        # The logits at position i - 1 predict token i.
        targets = tuple((0, i - 1, ids[i]) for i in range(1, len(ids)) if learnt[i])
        if not targets:
            raise NothingToLearnError(
                f"row {example.row}: its completion is longer than max_length {self.max_length}; "
                "raise task.max_length or shorten the row"
            )
        prompt = () if example.answers is None else self.prompt(example.segments[0][0])
        rows = (tuple(ids[: targets[-1][1] + 1]),)  # no logits are needed after the last target
        return Encoded(
            rows, (targets,), 0, prompt=prompt, answers=example.answers, is_shortened=is_shortened
        )

    def _learnt(self, example: Completion) -> tuple[list[int], list[bool]]:
        """Token ids up to the last one that the model learns, and which of them it learns."""
        ids, learnt = self.whole.learnt(example.segments, special=not example.is_rendered)
        end = self.tokenizer.eos_token_id
        if not example.is_rendered and end is not None and ids[-1:] != [end]:
            ids, learnt = [*ids, end], [*learnt, True]
        if not any(learnt):
            raise NothingToLearnError(
                f"row {example.row}: all of its answers have weight 0; remove the row"
            )
        num = len(learnt) - learnt[::-1].index(True)
        if learnt[0]:
            return self._start() + ids[:num], [False, *learnt[:num]]
        return ids[:num], learnt[:num]

    def _without_first_turns(self, example: Completion) -> Completion:
        """A conversation without as many first turns as it takes to fit, but with its last turn."""
        assert example.chat is not None
        learnt = [
            i
            for i, message in enumerate(example.chat.messages)
            if message["role"] == "assistant" and message.get("weight") != 0
        ]
        # What follows the last answer that is learnt needs no room.
        chat = replace(example.chat, messages=example.chat.messages[: learnt[-1] + 1])
        numbers = range(len(chat.turns))
        if not numbers:
            return example

        def fits(num: int) -> bool:
            shorter = chat.without_turns(num)
            text = rendered(shorter.messages, self.tokenizer, shorter.tools)
            return len(self.whole.ids(text, special=False)) <= self.max_length

        try:
            # Fewer turns have fewer tokens, so the number is found by bisection.
            num = min(bisect.bisect_left(numbers, True, key=fits), len(numbers) - 1)
            segments = segments_of(chat.without_turns(num), self.tokenizer)
        except ValueError:  # the template needs the first turns, so only tokens can be dropped
            return example
        return replace(example, segments=segments)

    def _outputs(self, example: Example | Completion) -> Encoded:
        if isinstance(example, Completion):
            if example.is_rendered:
                raise UserError(
                    "an encoder-decoder answers a text and takes no turns of a chat; choose task "
                    "completion, or a decoder"
                )
            (prompt, _), (completion, _) = example.segments
            inputs, gold, answers = [prompt], 0, example.answers
            texts = [completion if answers is None else completion.lstrip()]
        else:
            inputs, gold, answers = [example.prompt] * len(example.candidates), example.gold, None
            texts = [candidate.lstrip() for candidate in example.candidates]
            if example.ending:
                inputs = [f"{example.prompt}{candidate}" for candidate in example.candidates]
                texts = [example.ending.lstrip()] * len(texts)
        # A candidate's leading blank joins it to a prompt; the decoder has no prompt before it.
        outputs = tuple(tuple(self._output(text, example.row)) for text in texts)
        if isinstance(example, Example) and not example.ending:
            self._require_different(example, outputs)
        rows = tuple(tuple(self.prompt(text)) for text in inputs)
        targets = tuple(
            tuple((i, place, token) for place, token in enumerate(output))
            for i, output in enumerate(outputs)
        )
        return Encoded(rows, targets, gold, prompt=rows[0], answers=answers, outputs=outputs)

    def _output(self, text: str, row: int) -> list[int]:
        ids = list(self.tokenizer(text_target=text)["input_ids"])
        end = self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        if len(ids) > self.max_length:
            raise NothingToLearnError(
                f"row {row}: what is to be written has {len(ids)} tokens and max_length is "
                f"{self.max_length}; raise task.max_length or shorten the row"
            )
        return ids

    def _shorten(self, prompt: list[int], longest_tail: int, row: int) -> list[int]:
        # + 1 because the last token of a tail is predicted, but is no input.
        room = self.max_length - longest_tail + 1
        if room < 1:
            raise NothingToLearnError(
                f"row {row}: a candidate of {longest_tail} tokens does not fit into max_length "
                f"{self.max_length}; raise task.max_length"
            )
        return self.whole.cut(prompt, room)

    def _require_different(self, example: Example, tokens: Sequence[Sequence[int]]) -> None:
        """Refuse candidates that no score can tell apart."""
        remedy = "give other words in task.verbalizers, or choose another model"
        unknown = [text for text in example.candidates if self._is_unknown(text)]
        if unknown:
            raise UserError(
                f"row {example.row}: the tokenizer of this model does not know "
                f"{' and '.join(map(repr, unknown))}, which become {self.tokenizer.unk_token!r}; "
                f"{remedy}"
            )
        first: dict[tuple[int, ...], str] = {}
        for text, ids in zip(example.candidates, tokens, strict=True):
            other = first.setdefault(tuple(ids), text)
            if other != text:
                raise UserError(
                    f"row {example.row}: {other!r} and {text!r} have the same tokens for this "
                    f"model, so no score tells them apart; {remedy}"
                )

    def _is_unknown(self, text: str) -> bool:
        """Whether the tokenizer knows no letter of a text; remembered, as rows share candidates."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown is None:
            return False
        if text not in self._unknown:
            ids = self.whole.ids(text, special=False)
            words = self.tokenizer.decode(ids, skip_special_tokens=True)
            self._unknown[text] = unknown in ids and not words.strip()
        return self._unknown[text]


def encoder_for(tokenizer: Any, head: str, spec: TaskSpec) -> Encoder:
    """The encoder of a task's rows."""
    return Encoder(
        tokenizer, head=head, max_length=spec.max_length, max_new_tokens=spec.max_new_tokens
    )


def _continued(heads: Sequence[list[int]], tails: Sequence[list[int]], gold: int) -> Encoded:
    """One sequence per candidate, in which the logits before each token of the tail score it."""
    pairs = list(zip(heads, tails, strict=True))
    rows = tuple(tuple(head + tail[:-1]) for head, tail in pairs)
    targets = tuple(
        tuple((row, len(head) - 1 + i, token) for i, token in enumerate(tail))
        for row, (head, tail) in enumerate(pairs)
    )
    return Encoded(rows, targets, gold)


class Collator:
    """Pads encoded examples into a batch, a dict of int64 tensors.

    All models: `input_ids`, `attention_mask` and, for pairs, `token_type_ids` [rows, tokens];
    `gold` [examples]. Decoders: `place` [places, 2] (row and position of each scored logit);
    `token_place`, `token_id`, `token_candidate` [target tokens]; `candidate` [candidates, 2]
    (example and index in it). Encoder-decoders: also `output_ids` [rows, output tokens].

    Args:
        pad_token_id: the tokenizer's padding token.
        multiple: row lengths are padded to a multiple of this number.
    """

    def __init__(self, pad_token_id: int, *, multiple: int = 1) -> None:
        self.pad_token_id, self.multiple = pad_token_id, multiple

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Pad examples into one batch."""
        rows = [row for example in examples for row in example.rows]
        length = -(-max(map(len, rows)) // self.multiple) * self.multiple  # rounded up
        ids = torch.full((len(rows), length), self.pad_token_id)  # [rows, tokens]
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "gold": torch.tensor([example.gold for example in examples]),
        }
        if examples[0].types:
            types = torch.zeros_like(ids)
            for i, example in enumerate(examples):
                types[i, : len(example.types)] = torch.tensor(example.types)
            batch["token_type_ids"] = types
        if not examples[0].targets:
            return batch
        outputs = [output for example in examples for output in example.outputs]
        if outputs:
            length = max(map(len, outputs))
            batch["output_ids"] = torch.tensor(
                [(*output, *[self.pad_token_id] * (length - len(output))) for output in outputs]
            )
        # Candidates may share a logit: each (row, position) is computed once and numbered here.
        places: dict[tuple[int, int], int] = {}
        scored: list[tuple[int, int, int]] = []  # place, token, candidate
        candidates: list[tuple[int, int]] = []
        first_row = 0
        for e, example in enumerate(examples):
            for c, tokens in enumerate(example.targets):
                for offset, position, token in tokens:
                    place = places.setdefault((first_row + offset, position), len(places))
                    scored.append((place, token, len(candidates)))
                candidates.append((e, c))
            first_row += len(example.rows)
        token_place, token_id, token_candidate = map(torch.tensor, zip(*scored, strict=True))
        return batch | {
            "place": torch.tensor(list(places)),
            "token_place": token_place,
            "token_id": token_id,
            "token_candidate": token_candidate,
            "candidate": torch.tensor(candidates),
        }
