"""Predictions on rows without labels: the likeliest candidate, or a generated text."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from zofo.errors import UserError
from zofo.saved.artifact import Artifact
from zofo.scoring.evaluate import predict_scores
from zofo.scoring.generate import Writer
from zofo.tasks.answers import Answers
from zofo.tasks.classify import DEFAULT_TEMPLATE, candidates_of, fill, template_columns
from zofo.tasks.encode import Collator, encoder_for
from zofo.tasks.encode_rows import check_limits
from zofo.tasks.families.family import examples as builtin_examples
from zofo.tasks.families.passages import answers_in, require_passage_columns
from zofo.tasks.families.table import BUILTIN
from zofo.tasks.generate import answer_in, chat_in, rendered, turn_ends
from zofo.tasks.load import writes_answers, writes_text
from zofo.tasks.rows import Table, convert_rows, require_columns, text_in
from zofo.tasks.spec import Example, TaskSpec


def table_of_texts(spec: TaskSpec, texts: Sequence[str]) -> Table:
    """Texts from a command line as rows of the task.

    Raises:
        UserError: if the task's rows have more than one column.
    """
    values: Sequence[Any] = texts
    if spec.name == "chat":
        columns: Sequence[str] = [spec.messages.split("+")[0]]
        values = [[{"role": "user", "content": text}] for text in texts]
    else:
        columns = [spec.prompt] if spec.name == "completion" else _columns(spec)
    if len(columns) > 1:
        raise UserError(
            f"a row of task {spec.name} has several columns; give a file with {', '.join(columns)}"
        )
    rows = [{columns[0]: value} for value in values]
    return Table(list(enumerate(rows, start=1)), "the command line", {})


def predict(
    artifact: Artifact,
    spec: TaskSpec,
    table: Table,
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """One prediction per row, in the order of the rows.

    Args:
        artifact: the model.
        spec: the task it was trained on.
        table: the rows; their labels are ignored.
        batch_size: rows per forward pass.
        max_new_tokens: most tokens of a text. None: 64, or the task's number for answers.
        progress: called with the number of rows just done.

    Yields:
        `row` and `prediction`; also `probabilities` by label (classes), `scores` (choices), or `f1`
        and `exact_match` (answers, if the row has gold ones).

    Raises:
        UserError: for missing columns, bad rows, or labels that are not known.
    """
    if writes_text(spec):
        if artifact.base.head == "classification":
            raise UserError(f"{artifact.base.name} has a classification head and writes no text")
        longest = spec.max_new_tokens if writes_answers(spec) else 64
        yield from _write(artifact, spec, table, batch_size, max_new_tokens or longest, progress)
        return
    labels = _labels(artifact, spec)
    examples = _examples(spec, table, labels)
    encoder = encoder_for(artifact.tokenizer, artifact.base.head, spec)
    rows = [encoder(example) for example in examples]
    outputs = [ids for row in rows for ids in row.outputs]
    _check_limits(artifact, [ids for row in rows for ids in row.rows], outputs=outputs)
    scores = predict_scores(
        artifact.model,
        rows,
        Collator(artifact.tokenizer.pad_token_id),
        batch_size=batch_size,
        progress=progress,
    )
    for example, values in zip(examples, scores, strict=True):
        best = int(np.argmax(values))
        if labels:
            # Softmax of the scores, by logaddexp because exp of the scores could underflow.
            shares = np.exp(values - np.logaddexp.reduce(values)).tolist()
            details = {"probabilities": dict(zip(labels, shares, strict=True))}
        else:
            details = {"scores": values.tolist()}
        prediction = labels[best] if labels else example.candidates[best].strip()
        yield {"row": example.row, "prediction": prediction, **details}


def _check_limits(
    artifact: Artifact,
    sequences: Sequence[Sequence[int]],
    *,
    outputs: Sequence[Sequence[int]] = (),
    max_new_tokens: int = 0,
) -> None:
    for note in check_limits(
        artifact.model,
        artifact.tokenizer,
        sequences,
        outputs=outputs,
        max_new_tokens=max_new_tokens,
    ):
        warnings.warn(note, stacklevel=3)


def _template(spec: TaskSpec) -> str:
    """The prompt of the user's own rows."""
    return spec.template or DEFAULT_TEMPLATE.replace("text", spec.text)


def _columns(spec: TaskSpec) -> tuple[str, ...]:
    if spec.name in BUILTIN:
        return BUILTIN[spec.name].columns
    return template_columns(_template(spec))


def _labels(artifact: Artifact, spec: TaskSpec) -> tuple[str, ...]:
    if spec.name == "classification" and not artifact.labels:
        raise UserError(
            f"{artifact.base.name} was not trained on labels, so there is nothing to choose from; "
            "predict with a run folder or an artefact"
        )
    task = BUILTIN.get(spec.name)
    if task is None or (artifact.base.head == "classification" and artifact.labels):
        return artifact.labels
    # A decoder scores the words of the task, in the task's order.
    return task.classes if task.kind == "classification" else ()


def _examples(spec: TaskSpec, table: Table, labels: Sequence[str]) -> list[Example]:
    if spec.name in BUILTIN:
        return builtin_examples(
            BUILTIN[spec.name],
            table,
            template=spec.template,
            verbalizers=spec.verbalizers,
            is_labelled=False,
        )
    template, columns = _template(spec), _columns(spec)
    require_columns(table, columns, "The task's template names them")
    candidates = candidates_of(labels, spec.verbalizers)

    def convert(number: int, row: dict[str, Any]) -> Example:
        texts = [text_in(row, column) for column in columns]
        return Example(fill(template, row), candidates, 0, "\n".join(texts), number)

    return convert_rows(table, convert)


def _write(
    artifact: Artifact,
    spec: TaskSpec,
    table: Table,
    batch_size: int,
    max_new_tokens: int,
    progress: Callable[[int], None] | None,
) -> Iterator[dict[str, Any]]:
    if spec.name == "chat":
        prompts = _chat_prompts(artifact, spec, table)
    elif spec.name == "completion":
        require_columns(table, [spec.prompt], "Name yours with task.prompt")
        prompts = convert_rows(table, lambda _, row: text_in(row, spec.prompt))
    else:
        template = spec.template or BUILTIN[spec.name].template
        require_passage_columns(table, template)
        prompts = convert_rows(table, lambda _, row: fill(template, row))
    is_answer = writes_answers(spec)
    encoder = encoder_for(artifact.tokenizer, artifact.base.head, spec)

    def ids_of(prompt: str) -> Sequence[int]:
        if is_answer:  # shortened as in training
            return encoder.prompt(prompt)
        if spec.name == "chat":  # the chat template has already written the special tokens
            return encoder.whole.ids(prompt, special=False)
        is_read_by_encoder = artifact.base.head == "seq2seq"
        return encoder.whole.ids(prompt) if is_read_by_encoder else encoder.whole.open_ids(prompt)

    sequences = [ids_of(prompt) for prompt in prompts]
    is_continued = artifact.base.head == "causal-lm"
    _check_limits(artifact, sequences, max_new_tokens=max_new_tokens if is_continued else 0)
    ends = turn_ends(artifact.tokenizer) if spec.name == "chat" else ()
    writer = Writer(artifact.tokenizer, max_new_tokens, one_line=is_answer, ends=ends)
    written = writer(artifact.model, sequences, batch_size=batch_size, progress=progress)
    for (number, row), text in zip(table.rows, written.texts, strict=True):
        answers = _answers(spec, row) if is_answer else None
        entry = {"row": number, "prediction": text}
        if answers:
            entry |= {"f1": answers.f1(text), "exact_match": answers.exact_match(text)}
        yield entry


def _answers(spec: TaskSpec, row: dict[str, Any]) -> Answers | None:
    """The gold answers of a row; None if it has none, because they are optional here."""
    try:
        if spec.name == "completion":
            return answer_in(row, spec.completion)
        return answers_in(row, spec.name)  # type: ignore[arg-type]
    except ValueError:
        return None


def _chat_prompts(artifact: Artifact, spec: TaskSpec, table: Table) -> list[str]:
    tokenizer, column = artifact.tokenizer, spec.messages.split("+")[0]  # what is given
    require_columns(table, [column], "Name yours with task.messages")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"the tokenizer of {artifact.base.name} has no chat template")

    def convert(number: int, row: dict[str, Any]) -> str:
        chat = chat_in(row, column, source=table.source, must_end_with_answer=False)
        messages = list(chat.messages)
        # Drop the answer that the model shall write itself.
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError(f"{column!r} holds no message to answer")
        return rendered(messages, tokenizer, chat.tools, opened=True)

    return convert_rows(table, convert)
