"""Predictions on rows without labels: the likeliest candidate, or a written completion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from zofo.artifact import Artifact
from zofo.errors import UserError
from zofo.evaluate import predict_scores
from zofo.tasks import TaskSpec
from zofo.tasks.builtin import BUILTIN
from zofo.tasks.classify import DEFAULT_TEMPLATE, fill, template_columns
from zofo.tasks.encode import Collator, Encoder
from zofo.tasks.family import examples as builtin_examples
from zofo.tasks.generate import checked_messages
from zofo.tasks.rows import Table, convert_rows, require_columns, text_in
from zofo.tasks.spec import Example


def table_of_texts(spec: TaskSpec, texts: Sequence[str]) -> Table:
    """Texts from a command line as rows of the task.

    Raises:
        UserError: if the task's rows have more than one column.
    """
    if spec.name == "chat":
        rows: list[dict[str, Any]] = [
            {spec.messages: [{"role": "user", "content": text}]} for text in texts
        ]
    elif spec.name == "completion":
        rows = [{spec.prompt: text} for text in texts]
    else:
        columns = _columns(spec)
        if len(columns) > 1:
            raise UserError(
                f"a row of task {spec.name} has several columns; give a file with "
                f"{', '.join(columns)}"
            )
        rows = [{columns[0]: text} for text in texts]
    return Table(list(enumerate(rows, start=1)), "the command line", {})


def predict(
    artifact: Artifact,
    spec: TaskSpec,
    table: Table,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """One prediction a row, in the rows' order.

    Args:
        artifact: the model.
        spec: the task it was trained on.
        table: rows; labels are not looked at.
        batch_size: rows a forward.
        max_new_tokens: longest completion.
        progress: called with the number of rows just done.

    Yields:
        `row`, `prediction`, and for classes `probabilities` by label; for choices `scores`.

    Raises:
        UserError: for missing columns, bad rows, or labels that are not known.
    """
    if spec.name in ("completion", "chat"):
        yield from _write(artifact, spec, table, max_new_tokens, progress)
        return
    labels = _labels(artifact, spec)
    examples = _examples(spec, table, labels)
    encoder = Encoder(artifact.tokenizer, head=artifact.base.head, max_length=spec.max_length)
    scores = predict_scores(
        artifact.model,
        [encoder(example) for example in examples],
        Collator(artifact.tokenizer.pad_token_id),
        batch_size=batch_size,
        progress=progress,
    )
    for example, values in zip(examples, scores, strict=True):
        best = int(np.argmax(values))
        shares = np.exp(values - np.logaddexp.reduce(values)).tolist()
        if labels:
            yield {
                "row": example.row,
                "prediction": labels[best],
                "probabilities": dict(zip(labels, shares, strict=True)),
            }
        else:
            yield {
                "row": example.row,
                "prediction": example.candidates[best].strip(),
                "scores": values.tolist(),
            }


def _template(spec: TaskSpec) -> str:
    """Of the user's own rows."""
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
    if spec.name in BUILTIN:
        task = BUILTIN[spec.name]
        return artifact.labels or (task.classes if task.kind == "classification" else ())
    return artifact.labels


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
    candidates = tuple((spec.verbalizers or {}).get(x, f" {x}") for x in labels)

    def convert(number: int, row: dict[str, Any]) -> Example:
        texts = [text_in(row, column) for column in columns]
        return Example(fill(template, row), candidates, 0, "\n".join(texts), number)

    return convert_rows(table, convert)


@torch.no_grad()
def _write(
    artifact: Artifact,
    spec: TaskSpec,
    table: Table,
    max_new_tokens: int,
    progress: Callable[[int], None] | None,
) -> Iterator[dict[str, Any]]:
    tokenizer, model = artifact.tokenizer, artifact.model
    column = spec.messages if spec.name == "chat" else spec.prompt
    key = "messages" if spec.name == "chat" else "prompt"
    require_columns(table, [column], f"Name yours with task.{key}")
    if spec.name == "chat" and not getattr(tokenizer, "chat_template", None):
        raise UserError(f"the tokenizer of {artifact.base.name} has no chat template")

    def convert(number: int, row: dict[str, Any]) -> tuple[int, str]:
        if spec.name == "completion":
            return number, text_in(row, column)
        messages = checked_messages(row[column], column, must_end_with_answer=False)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError(f"{column!r} holds no message to answer")
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return number, str(text)

    device = next(model.parameters()).device
    for number, prompt in convert_rows(table, convert):
        ids = tokenizer(
            prompt, add_special_tokens=spec.name == "completion", return_tensors="pt"
        ).to(device)
        written = model.generate(  # type: ignore[operator]
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )[0]
        # Some adapters' generate returns the new tokens alone.
        prompt_ids = ids["input_ids"][0]
        if torch.equal(written[: len(prompt_ids)], prompt_ids):
            written = written[len(prompt_ids) :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        if progress is not None:
            progress(1)
        yield {"row": number, "prediction": text}
