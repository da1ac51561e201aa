"""Data types of a task: its options, its examples and its splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from zofo.sections import Section
from zofo.tasks.answers import Answers

Kind = Literal["classification", "choice", "completion", "generation"]
Objective = Literal["candidates", "gold"]
Sizes = tuple[int | None, int | None, int | None]


class TaskSpec(Section):
    """Options of a task; an option that the task does not use must keep its default."""

    name: str = Field(
        "rotten-tomatoes",
        description="a built-in task, or classification, completion or chat for your own rows",
    )
    train: str | None = Field(
        None,
        description="your rows: a jsonl, json, csv, tsv or parquet file, a hub dataset id, or "
        "reasoning-gym:NAME?OPTIONS",
    )
    dev: str | None = Field(
        None, description="file, or name of the hub split; default: carved from train"
    )
    test: str | None = Field(
        None, description="file, or name of the hub split; default: carved from train"
    )
    subset: str | None = Field(None, description="configuration name of the hub dataset")
    data_dir: str | None = Field(
        None, description="folder with a built-in task's files, in the hub's columns"
    )
    text: str = Field("text", description="column of the text (classification)")
    label: str = Field("label", description="column of the label (classification)")
    prompt: str = Field("prompt", description="column of the prompt (completion)")
    completion: str = Field("completion", description="column of the completion (completion)")
    messages: str = Field(
        "messages",
        description="column of the messages, or several joined by +, such as prompt+completion, of "
        "which the last is learnt (chat)",
    )
    template: str | None = Field(
        None, description="prompt with columns in braces, such as '{text} It was'"
    )
    verbalizers: dict[str, str] | None = Field(
        None, description="label -> what the model should write after the prompt, such as ' great'"
    )
    num_train: int | None = Field(None, ge=1, description="rows to train on; default: the task's")
    num_dev: int | None = Field(None, ge=1, description="rows to select on; default: the task's")
    num_test: int | None = Field(None, ge=1, description="rows to report on; default: the task's")
    max_length: int = Field(
        256,
        ge=8,
        description="tokens of a row; a longer prompt loses its beginning, a longer chat its first "
        "turns (squad, drop: 1024)",
    )
    objective: Objective = Field(
        "candidates",
        description="training loss: cross-entropy over the candidates, or likelihood of the right "
        "one (gold)",
    )
    metric: Literal["f1"] | None = Field(
        None,
        description="f1: also write an answer to each held-out prompt, and score it (completion)",
    )
    max_new_tokens: int = Field(
        50, ge=1, description="tokens of a written answer (squad, drop, metric f1; MeZO: 50)"
    )

    @model_validator(mode="before")
    @classmethod
    def _passages_are_long(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") in ("squad", "drop"):
            return {"max_length": 1024, **values}
        return values

    @field_validator("verbalizers", mode="before")
    @classmethod
    def _labels_as_text(cls, value: Any) -> Any:
        """Turn keys into text, because YAML reads 0 and true as a number and a Boolean."""
        if not isinstance(value, dict):
            return value
        return {str(k).lower() if isinstance(k, bool) else str(k): v for k, v in value.items()}


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: each with role and content; the model does not learn those of `weight` 0.
        tools: descriptions of the tools that the assistant may call.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None

    @property
    def turns(self) -> list[int]:
        """Indices of the user's messages, with each of which a turn begins."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]

    def without_turns(self, num: int) -> Chat:
        """The conversation without its first turns, but with its system message."""
        kept = self.messages[self.turns[num] :]
        is_system = self.messages[0]["role"] in ("system", "developer")
        return replace(self, messages=[*self.messages[: int(is_system)], *kept])


@dataclass(frozen=True)
class Example:
    """One row, ready for a model.

    Attributes:
        prompt: text before the candidates.
        candidates: texts that may follow the prompt.
        gold: index of the right candidate.
        text: the row's own text, for encoders and for finding duplicates: one sequence, or a pair
            that the tokenizer joins.
        row: number of the row in its file, from 1.
        ending: text after every candidate. If it is given, it is scored instead of the candidate.
        group: rows of one group stay in one carved part; empty: the row is a group of its own.
    """

    prompt: str
    candidates: tuple[str, ...]
    gold: int
    text: str | tuple[str, str]
    row: int
    ending: str = ""
    group: str = ""


@dataclass(frozen=True)
class Completion:
    """One row whose text the model learns to write.

    Attributes:
        segments: pieces of text in order, and whether the model learns to write them.
        text: text by which duplicates are found.
        row: number of the row in its file, from 1.
        is_rendered: a chat template has already written the special tokens. Otherwise the encoder
            adds the tokenizer's and an end token.
        answers: gold answers after the first segment; None: no answer is generated.
        group: as for `Example`.
        chat: the messages that the segments were written from, to shorten a long conversation.
    """

    segments: tuple[tuple[str, bool], ...]
    text: str
    row: int
    is_rendered: bool = False
    answers: Answers | None = None
    group: str = ""
    chat: Chat | None = None


@dataclass(frozen=True)
class Splits:
    """A task's rows.

    Attributes:
        kind: "classification" (the same labels for every row), "choice" (every row has its own
            candidates), "completion" (text to learn) or "generation" (answers to learn, which are
            also generated and scored).
        train, dev, test: `Example`s, or `Completion`s.
        labels: names of the classes; empty unless kind is "classification".
        notes: what was done to the rows (duplicates removed, ...), for the record.
        changes: how the data differs from that of a run, in words; empty if it does not.
        lost: the rows of the run that are no longer there, in words; empty if all are there.
    """

    kind: Kind
    train: tuple[Any, ...]
    dev: tuple[Any, ...]
    test: tuple[Any, ...]
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    changes: str = ""
    lost: str = ""

    def part(self, name: str) -> tuple[Any, ...]:
        """The rows of "train", "dev" or "test"."""
        return {"train": self.train, "dev": self.dev, "test": self.test}[name]
