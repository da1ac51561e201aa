"""Examples whose continuation the model learns: prompt and completion, or chat messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from zofo.errors import UserError
from zofo.tasks.answers import Answers
from zofo.tasks.rows import Table, convert_rows, require_columns, text_in
from zofo.tasks.spec import Completion

_ROLES: Final = ("system", "user", "assistant", "tool", "developer")


def completions(
    table: Table, *, prompt_column: str, completion_column: str, is_answer: bool = False
) -> list[Completion]:
    """One completion per row; no blank is put between prompt and completion.

    Args:
        table: the rows.
        prompt_column: column of the prompt.
        completion_column: column of the completion, which the model learns.
        is_answer: the completion is a short answer, with which a generated answer is compared.

    Raises:
        UserError: for missing columns or bad rows.
    """
    remedy = "Name yours with task.prompt and task.completion"
    require_columns(table, [prompt_column, completion_column], remedy)

    def convert(number: int, row: dict[str, Any]) -> Completion:
        prompt, completion = text_in(row, prompt_column), text_in(row, completion_column)
        answers = answer_in(row, completion_column) if is_answer else None
        segments = ((prompt, False), (completion, True))
        return Completion(segments, prompt + completion, number, answers=answers)

    return convert_rows(table, convert)


def answer_in(row: dict[str, Any], column: str) -> Answers:
    """The completion as the only gold answer; raises ValueError if it has several lines."""
    text = text_in(row, column)
    if "\n" in text.rstrip():
        raise ValueError(
            f"{column!r} breaks the line, and F1 scores what is written up to there; put line "
            "breaks before it into the prompt, or leave task.metric out"
        )
    return Answers(((text,),))


def chats(table: Table, *, messages_column: str, tokenizer: Any) -> list[Completion]:
    """One conversation per row, in the chat template; the model learns the assistant turns.

    Raises:
        UserError: for a missing column, bad rows, or a tokenizer without a chat template.
    """
    require_columns(table, [messages_column], "Name yours with task.messages")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the tokenizer has no chat template, so messages cannot be written as text; choose an "
            "instruction-tuned model, or use task completion"
        )

    def convert(number: int, row: dict[str, Any]) -> Completion:
        messages = checked_messages(row[messages_column], messages_column)
        text = "\n".join(f"{m['role']}: {m['content']}" for m in messages)
        return Completion(_segments(messages, tokenizer), text, number, is_rendered=True)

    return convert_rows(table, convert)


def checked_messages(
    value: Any, column: str, *, must_end_with_answer: bool = True
) -> list[dict[str, str]]:
    """The messages of a row; raises ValueError if they are malformed."""
    if hasattr(value, "tolist"):  # parquet gives arrays
        value = value.tolist()
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column!r} must be a list of messages, each with role and content")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {i + 1} must be an object with role and content")
        if message.get("role") not in _ROLES:
            raise ValueError(
                f"message {i + 1} has role {message.get('role')!r}; use one of {', '.join(_ROLES)}"
            )
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {i + 1} has content {message.get('content')!r}, not a text")
    if must_end_with_answer and value[-1]["role"] != "assistant":
        raise ValueError("the last message must be the assistant's: it is what the model learns")
    return [dict(message) for message in value]


def _segments(messages: Sequence[dict[str, str]], tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    """Alternating context and assistant turns.

    Some templates rewrite earlier turns, for example to drop their reasoning. The model then learns
    only the last turn, because the earlier text is not a prefix of the whole.
    """

    def render(part: Sequence[dict[str, str]], opened: bool) -> str:
        options = {"tokenize": False, "add_generation_prompt": opened}
        try:
            return str(tokenizer.apply_chat_template(list(part), **options))
        except Exception as error:  # a template raises jinja's errors to refuse messages
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    whole = render(messages, False)
    segments: list[tuple[str, bool]] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(messages[:i], True), render(messages[: i + 1], False)
        # Each text must continue the previous one, or the turns cannot be cut from the whole.
        if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
            break
        segments += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    else:
        return tuple(segments)
    before = render(messages[:-1], True)
    if not whole.startswith(before):
        raise ValueError(
            "the chat template does not write the last answer after its generation prompt; use "
            "task completion with the text as the model expects it"
        )
    return (before, False), (whole[len(before) :], True)
