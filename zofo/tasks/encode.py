"""Examples as tensors, and the two numbers everything rests on: scores and losses.

    score(candidate) = mean over its tokens of log p(token | what stands before it)
    candidates:  loss = −log softmax(scores)[gold]
    gold:        loss = −score(gold);  over completions the mean runs over all target tokens

Logits are computed only at positions that are scored, and turned into float32 there. Rows are
padded on the right, so that a row's scores do not depend on its neighbours in the batch.

Encoder-decoders read the prompt in the encoder and write the candidate, with its end token, in the
decoder: a score is minus transformers' loss with that candidate as labels.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zofo.errors import UserError
from zofo.tasks.answers import Answers
from zofo.tasks.spec import Completion, Example, Objective, TaskSpec


@dataclass(frozen=True)
class Encoded:
    """One example in tokens.

    Attributes:
        rows: token ids of each sequence to run; of an encoder-decoder, what the encoder reads.
        targets: for each candidate the tokens that score it: (row, position of the logit, token).
        gold: index of the right candidate.
        types: of a pair of texts whose tokenizer tells them apart: 0 or 1 for each token.
        prompt: token ids that an answer is to be written after; empty where none is.
        answers: what counts as right there.
        outputs: what an encoder-decoder's decoder writes for each row.
    """

    rows: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[tuple[int, int, int], ...], ...]
    gold: int
    types: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    answers: Answers | None = None
    outputs: tuple[tuple[int, ...], ...] = ()

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, (*self.rows, *self.outputs)))


class Encoder:
    """Turns a task's rows into tokens.

    Args:
        tokenizer: the model's.
        head: "causal-lm", "seq2seq" or "classification".
        max_length: tokens a sequence; a prompt loses its beginning, an encoder's text its end.
        max_new_tokens: of them, those that stay free for an answer to be written.
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

    def __call__(self, example: Example | Completion) -> Encoded:
        """Encode one row.

        Raises:
            UserError: if its candidate or completion alone is longer than `max_length`.
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
        """An encoder's text, or pair of texts, of which the longer one is cut."""
        is_pair = not isinstance(example.text, str)
        texts = example.text if is_pair else (example.text,)
        ids = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        types = tuple(ids.get("token_type_ids", ())) if is_pair else ()
        return Encoded((tuple(ids["input_ids"]),), (), example.gold, types)

    def prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt that an answer is to be written after."""
        ids = self._ids(text) or self._start()
        return tuple(ids[-max(1, self.max_length - self.max_new_tokens) :])

    def _ids(self, text: str, special: bool = True) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _start(self) -> list[int]:
        """What a first target token is conditioned on when there is no prompt."""
        start = self.tokenizer.bos_token_id
        return [self.tokenizer.eos_token_id if start is None else start]

    def _candidates(self, example: Example) -> Encoded:
        prompt = self._ids(example.prompt)
        full = [self._ids(example.prompt + candidate) for candidate in example.candidates]
        shared = min(_common(prompt, ids) for ids in full)
        if shared == 0:
            full = [self._start() + ids for ids in full]
            shared = 1
        if any(len(ids) <= shared for ids in full):
            raise UserError(
                f"row {example.row}: the candidate {min(example.candidates, key=len)!r} adds no "
                "token to the prompt; write it out in task.verbalizers"
            )
        tails = [ids[shared:] for ids in full]
        head = self._shorten(full[0][:shared], max(map(len, tails)), example.row)
        if all(len(tail) == 1 for tail in tails):
            place = len(head) - 1
            return Encoded(
                (tuple(head),), tuple(((0, place, tail[0]),) for tail in tails), example.gold
            )
        rows = tuple(tuple(head + tail[:-1]) for tail in tails)
        targets = tuple(
            tuple((row, len(head) - 1 + i, token) for i, token in enumerate(tail))
            for row, tail in enumerate(tails)
        )
        return Encoded(rows, targets, example.gold)

    def _endings(self, example: Example) -> Encoded:
        """One sequence a candidate; scored are the tokens that all have after their candidates."""
        before = [self._ids(example.prompt + candidate) for candidate in example.candidates]
        full = [
            self._ids(example.prompt + candidate + example.ending)
            for candidate in example.candidates
        ]
        tails = [ids[_common(start, ids) :] for start, ids in zip(before, full, strict=True)]
        num = min(_common(tails[0][::-1], tail[::-1]) for tail in tails)
        if num == 0:
            raise UserError(
                f"row {example.row}: {example.ending!r} has other tokens after each candidate; "
                "begin it with a blank"
            )
        # A tokenizer may put the end of a candidate and the beginning of the ending in one token.
        heads = [self._shorten(ids[:-num] or self._start(), num, example.row) for ids in full]
        ending = full[0][-num:]
        rows = tuple(tuple(head + ending[:-1]) for head in heads)
        targets = tuple(
            tuple((row, len(head) - 1 + i, token) for i, token in enumerate(ending))
            for row, head in enumerate(heads)
        )
        return Encoded(rows, targets, example.gold)

    def _completion(self, example: Completion) -> Encoded:
        ids: list[int] = []
        learnt: list[bool] = []
        for text, is_target in example.segments:
            part = self._ids(text, special=not ids and not example.is_rendered and not is_target)
            ids += part
            learnt += [is_target] * len(part)
        if not example.is_rendered and self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
            learnt.append(True)
        if learnt[0]:
            ids, learnt = self._start() + ids, [False, *learnt]
        # Too long: the beginning goes, as long as something to learn from stays.
        excess = max(0, len(ids) - self.max_length)
        ids, learnt = ids[excess:], learnt[excess:]
        targets = tuple((0, i - 1, ids[i]) for i in range(1, len(ids)) if learnt[i])
        if not targets or (excess and learnt[0]):
            raise UserError(
                f"row {example.row}: its completion is longer than max_length {self.max_length}; "
                "raise task.max_length or shorten the row"
            )
        last = targets[-1][1]
        prompt = () if example.answers is None else self.prompt(example.segments[0][0])
        rows = (tuple(ids[: last + 1]),)
        return Encoded(rows, (targets,), 0, prompt=prompt, answers=example.answers)

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
        # The blank of a candidate joins it to a prompt; here nothing stands before it.
        outputs = tuple(tuple(self._output(text, example.row)) for text in texts)
        rows = tuple(
            tuple(self._ids(text)[-self.max_length :]) or tuple(self._start()) for text in inputs
        )
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
            raise UserError(
                f"row {row}: what is to be written has {len(ids)} tokens and max_length is "
                f"{self.max_length}; raise task.max_length or shorten the row"
            )
        return ids

    def _shorten(self, prompt: list[int], longest_tail: int, row: int) -> list[int]:
        room = self.max_length - longest_tail + 1
        if room < 1:
            raise UserError(
                f"row {row}: a candidate of {longest_tail} tokens does not fit into max_length "
                f"{self.max_length}; raise task.max_length"
            )
        return prompt[-room:]


def encoder_for(tokenizer: Any, head: str, spec: TaskSpec) -> Encoder:
    """The encoder of a task's rows."""
    return Encoder(
        tokenizer, head=head, max_length=spec.max_length, max_new_tokens=spec.max_new_tokens
    )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


class Collator:
    """Pads encoded examples into a batch.

    The batch is a dict of tensors: `input_ids`, `attention_mask` [rows, length], and
    `token_type_ids` of that shape for pairs; `gold` [examples]; and for decoders `place` [places,
    2] (row, position of each scored logit), `token_place`, `token_id`, `token_candidate` [tokens],
    `candidate` [candidates, 2] (example, index in it); for encoder-decoders `output_ids` [rows,
    output length] too.

    Args:
        pad_token_id: the tokenizer's.
        multiple: lengths are padded to a multiple of this.
    """

    def __init__(self, pad_token_id: int, *, multiple: int = 1) -> None:
        self.pad_token_id, self.multiple = pad_token_id, multiple

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """One batch."""
        rows = [row for example in examples for row in example.rows]
        length = -(-max(map(len, rows)) // self.multiple) * self.multiple
        ids = torch.full((len(rows), length), self.pad_token_id)
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
        places: dict[tuple[int, int], int] = {}
        token_place: list[int] = []
        token_id: list[int] = []
        token_candidate: list[int] = []
        candidates: list[tuple[int, int]] = []
        first_row = 0
        for e, example in enumerate(examples):
            for c, tokens in enumerate(example.targets):
                for offset, position, token in tokens:
                    place = (first_row + offset, position)
                    token_place.append(places.setdefault(place, len(places)))
                    token_id.append(token)
                    token_candidate.append(len(candidates))
                candidates.append((e, c))
            first_row += len(example.rows)
        return batch | {
            "place": torch.tensor(list(places)),
            "token_place": torch.tensor(token_place),
            "token_id": torch.tensor(token_id),
            "token_candidate": torch.tensor(token_candidate),
            "candidate": torch.tensor(candidates),
        }


@dataclass(frozen=True)
class TokenScores:
    """For every target token: its log-likelihood (float32) and whether it is the likeliest."""

    log_likelihood: Tensor
    is_first_choice: Tensor | None


def token_scores(
    model: nn.Module, batch: dict[str, Tensor], *, with_first_choice: bool = False
) -> TokenScores:
    """Score every target token of a batch with targets; tensors of shape [tokens]."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    place = batch["place"]
    if "output_ids" in batch:
        # Teacher forcing: each token is scored at the one before it.
        outputs, start = batch["output_ids"], _decoder_start(model)
        begin = outputs.new_full((len(outputs), 1), start)
        inputs["decoder_input_ids"] = torch.cat((begin, outputs[:, :-1]), dim=1)
    if _keeps_logits(model):
        wanted, slot = place[:, 1].unique(return_inverse=True)
        logits = model(**inputs, logits_to_keep=wanted + virtual_tokens(model)).logits
    else:
        logits = model(**inputs).logits
        slot = place[:, 1] + virtual_tokens(model)
    scored = logits[place[:, 0], slot].float()
    chosen = scored[batch["token_place"], batch["token_id"]]
    first = scored.argmax(dim=-1)[batch["token_place"]] if with_first_choice else None
    return TokenScores(
        chosen - torch.logsumexp(scored, dim=-1)[batch["token_place"]],
        None if first is None else first == batch["token_id"],
    )


def candidate_scores(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Score of every candidate: float32, shape [examples, most candidates], −inf where none is."""
    if "place" not in batch:
        return functional.log_softmax(_encoder_logits(model, batch), dim=-1)
    scores = _mean_by(token_scores(model, batch).log_likelihood, batch["token_candidate"])
    example, index = batch["candidate"].unbind(1)
    table = scores.new_full((len(batch["gold"]), int(index.max()) + 1), -torch.inf)
    return table.index_put((example, index), scores)


def objective_loss(
    model: nn.Module, batch: dict[str, Tensor], objective: Objective = "candidates"
) -> Tensor:
    """The training loss of a batch: float32 scalar; see `objective_losses`."""
    return objective_losses(model, batch, objective)[0]


def objective_losses(
    model: nn.Module, batch: dict[str, Tensor], objective: Objective = "candidates"
) -> tuple[Tensor, Tensor]:
    """The training loss of a batch, and each example's share in it; see `losses_and_errors`."""
    return losses_and_errors(model, batch, objective)[:2]


def losses_and_errors(
    model: nn.Module, batch: dict[str, Tensor], objective: Objective = "candidates"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The training loss of a batch, each example's share in it, and which were predicted wrongly.

    Args:
        model: the model.
        batch: as from `Collator`, or a part of one as from `first_examples`.
        objective: "candidates" or "gold"; completions have one candidate, so there it is "gold".

    Returns:
        The loss, a float32 scalar; shares, detached, [examples]: their mean is the loss, up to
        rounding, and the mean of some of them is unbiased for it. The loss of completions is a mean
        over tokens: a share is an example's sum over the tokens an example has on average.
        Errors, float64, [examples]: 1 where another candidate has the highest score, else 0; None
        for completions.
    """
    gold = batch["gold"]
    if "place" not in batch:
        logits = _encoder_logits(model, batch)
        return *_cross_entropies(logits, gold), _errors(logits, gold)
    if len(batch["candidate"]) == len(gold):
        losses = -token_scores(model, batch).log_likelihood
        sums = losses.new_zeros(len(gold)).index_add(0, batch["token_candidate"], losses.detach())
        tokens = batch.get("tokens_per_example", len(losses) / len(gold))
        return losses.mean(), sums / tokens, None
    scores = candidate_scores(model, batch)
    errors = _errors(scores, gold)
    if objective == "candidates":
        return *_cross_entropies(scores, gold), errors
    losses = -scores.gather(1, gold[:, None])
    return losses.mean(), losses.detach()[:, 0], errors


def first_examples(batch: dict[str, Tensor], num: int) -> tuple[dict[str, Tensor], float]:
    """The first examples of a batch, padded as they were, and their share of its rows."""
    gold = batch["gold"]
    if "place" not in batch:
        return {name: tensor[:num] for name, tensor in batch.items()}, num / len(gold)
    num_candidates = int((batch["candidate"][:, 0] < num).sum())
    num_tokens = int((batch["token_candidate"] < num_candidates).sum())
    # Places and rows are numbered as the examples come.
    num_places = int(batch["token_place"][:num_tokens].max()) + 1
    num_rows = int(batch["place"][:num_places, 0].max()) + 1
    ends = {
        "input_ids": num_rows,
        "attention_mask": num_rows,
        "gold": num,
        "place": num_places,
        "token_place": num_tokens,
        "token_id": num_tokens,
        "token_candidate": num_tokens,
        "candidate": num_candidates,
    }
    if "output_ids" in batch:
        ends["output_ids"] = num_rows
    part = {name: batch[name][:end] for name, end in ends.items()}
    part["tokens_per_example"] = torch.tensor(len(batch["token_id"]) / len(gold))
    return part, num_rows / len(batch["input_ids"])


def _cross_entropies(scores: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    loss = functional.cross_entropy(scores, gold)
    return loss, functional.cross_entropy(scores.detach(), gold, reduction="none")


def _errors(scores: Tensor, gold: Tensor) -> Tensor:
    return (scores.detach().argmax(dim=1) != gold).double()


def _encoder_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    names = ("input_ids", "attention_mask", "token_type_ids")
    output = model(**{name: batch[name] for name in names if name in batch})
    logits: Tensor = output.logits
    return logits.float()


def _mean_by(values: Tensor, group: Tensor) -> Tensor:
    num_groups = int(group.max()) + 1
    counts = torch.bincount(group, minlength=num_groups).to(values.dtype)
    return values.new_zeros(num_groups).index_add(0, group, values) / counts


def virtual_tokens(model: Any) -> int:
    """Tokens that a prompt puts before the scored ones; a prefix lives in the cache instead."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    if config is None or not getattr(config, "is_prompt_learning", False):
        return 0
    if getattr(model.config, "is_encoder_decoder", False):  # the encoder's input has them
        return 0
    if str(getattr(config.peft_type, "value", config.peft_type)) in ("PREFIX_TUNING", "CARTRIDGE"):
        return 0
    return int(config.num_virtual_tokens)


def _decoder_start(model: Any) -> int:
    """The token that stands before everything a decoder writes."""
    config = model.config
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(config, "bos_token_id", None)
    if start is None:
        raise UserError(
            f"the configuration of {model.__class__.__name__} has no decoder_start_token_id; set it"
        )
    return int(start)


def _keeps_logits(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
