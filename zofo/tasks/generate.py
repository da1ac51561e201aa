"""Examples whose continuation the model learns: prompt and completion, or chat messages."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from zofo.errors import UserError, shown
from zofo.tasks.answers import Answers
from zofo.tasks.rows import Table, convert_rows, require_columns, text_in
from zofo.tasks.spec import Chat, Completion
from zofo.tasks.whole_text import Segments, WholeText

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

    The column `tools`, if there is one, describes the tools that the assistant may call. The model
    does not learn a message with `weight` 0. Of several columns of messages, joined by +, it learns
    those of the last.

    Raises:
        UserError: for a missing column, bad rows, or a tokenizer without a chat template.
    """
    columns = parts_of(messages_column, table.rows[0][1])
    require_columns(table, columns, "Name yours with task.messages")
    require_template(tokenizer)

    def convert(number: int, row: dict[str, Any]) -> Completion:
        before = [
            chat_in(row, column, source=table.source, must_end_with_answer=False).messages
            for column in columns[:-1]
        ]
        chat = chat_in(row, columns[-1], source=table.source)
        return conversation([m for part in before for m in part], chat, number, tokenizer)

    rows = convert_rows(table, convert)
    tools = next((row.chat.tools for row in rows if row.chat and row.chat.tools), None)
    if tools and "tools" not in _template(tokenizer, tools):
        warnings.warn(
            f"{table.source} has a column 'tools', which the chat template does not show to the "
            "model",
            stacklevel=2,
        )
    return rows


def parts_of(column: str, row: Mapping[str, Any]) -> list[str]:
    """The columns of messages that a name stands for: itself, or those that it joins by +."""
    return [column] if column in row else column.split("+")


def require_template(tokenizer: Any) -> None:
    """Raises UserError if a tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the tokenizer has no chat template, so messages cannot be written as text; choose an "
            "instruction-tuned model, or use task completion"
        )


def conversation(
    before: Sequence[Mapping[str, Any]], chat: Chat, number: int, tokenizer: Any
) -> Completion:
    """A conversation of which the model learns only what comes after its first messages.

    Args:
        before: the first messages.
        chat: the further ones.
        number: of the row.
        tokenizer: has a chat template.

    Raises:
        ValueError: if the chat template cannot write it.
    """
    known = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in before]
    chat = replace(chat, messages=[*known, *chat.messages])
    text = "\n".join(map(_text_of, chat.messages))
    return Completion(segments_of(chat, tokenizer), text, number, is_rendered=True, chat=chat)


def _text_of(message: Mapping[str, Any]) -> str:
    """What tells a message from others: its role, what it says, and the tools that it calls."""
    calls = message.get("tool_calls")
    called = f" {json.dumps(calls, sort_keys=True, default=str)}" if calls else ""
    return f"{message['role']}: {message['content']}{called}"


def chat_in(
    row: Mapping[str, Any], column: str, *, source: str, must_end_with_answer: bool = True
) -> Chat:
    """The conversation of a row; raises ValueError if it is malformed."""
    # Tables of columns fill missing keys with None, while a null in a JSON file was written there.
    keeps_nulls = source.lower().endswith((".jsonl", ".ndjson", ".json"))
    messages = _plain(row.get(column), keeps_nulls)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{column!r} must be a list of messages, each with role and content")
    found = [_checked_message(i, message) for i, message in enumerate(messages, start=1)]
    if must_end_with_answer and found[-1]["role"] != "assistant":
        raise ValueError("the last message must be the assistant's: it is what the model learns")
    tools = _plain(row.get("tools"), keeps_nulls)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"'tools' is not valid JSON ({error}); give a list") from error
    if not tools or tools != tools:  # pandas reads a missing value as NaN
        return Chat(found)
    if not isinstance(tools, list):
        raise ValueError(f"'tools' is {shown(tools)}; give a list with a description of each tool")
    return Chat(found, tools)


def _plain(value: Any, keeps_nulls: bool) -> Any:
    """The value with lists in place of arrays."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if keeps_nulls or v is not None}
        return {str(k): _plain(v, keeps_nulls) for k, v in kept.items()}
    return [_plain(v, keeps_nulls) for v in value] if isinstance(value, list | tuple) else value


def _checked_message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} must be an object with role and content")
    role = message.get("role")
    if role not in _ROLES:
        raise ValueError(f"message {number} has role {role!r}; use one of {', '.join(_ROLES)}")
    # Templates ask which keys there are, and a null stands for a key that is not there.
    found = {key: value for key, value in message.items() if value is not None}
    if "content" not in found and found.get("tool_calls"):
        found["content"] = ""
    if not isinstance(found.get("content"), str):
        raise ValueError(
            f"message {number} has content {shown(found.get('content'))}, not a text; write it as "
            "one text (only a message with tool_calls needs none)"
        )
    if found.get("weight", 1) not in (0, 1):
        raise ValueError(
            f"message {number} has weight {found['weight']!r}; use 1 for what the model learns and "
            "0 for what it does not"
        )
    return found


def rendered(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    tools: Sequence[Any] | None = None,
    *,
    opened: bool = False,
) -> str:
    """Messages in the chat template, `opened` for the next answer; raises ValueError."""
    known = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": opened}
    if tools:
        options["tools"] = list(tools)
    if any(m.get("tool_calls") for m in known) and "tool_calls" not in _template(tokenizer, tools):
        raise ValueError(
            "the chat template does not write tool_calls; choose a model whose template does, or "
            "write them as content"
        )
    try:
        return str(tokenizer.apply_chat_template(known, **options))
    except Exception as error:  # a template raises jinja's errors to refuse messages
        raise ValueError(
            f"the chat template refuses the messages: {error}; change them, or choose a model "
            "whose template takes them"
        ) from error


def _template(tokenizer: Any, tools: Any) -> str:
    return str(tokenizer.get_chat_template(tools=tools))


def turn_ends(tokenizer: Any) -> tuple[int, ...]:
    """The special token with which the chat template ends an assistant turn, if there is one."""
    answer = "An answer."
    turn = ({"role": "user", "content": "A question."}, {"role": "assistant", "content": answer})
    try:
        text = rendered(turn, tokenizer)
    except ValueError:
        return ()
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    _, found, tail = text.rpartition(answer)
    for token in WholeText(tokenizer).ids(tail, special=False) if found else ():
        if token in special:
            return (token,)
        if tokenizer.decode([token]).strip():  # words, which are no token of their own
            return ()
    return ()


def segments_of(chat: Chat, tokenizer: Any) -> Segments:
    """Alternating context and assistant turns; raises ValueError.

    Some templates rewrite earlier turns, for example to drop their reasoning. The model then learns
    only the last turn, because the earlier text is not a prefix of the whole.
    """
    messages = chat.messages
    whole = rendered(messages, tokenizer, chat.tools)
    segments: list[tuple[str, bool]] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        if i == 0:
            raise ValueError(
                "the conversation begins with the assistant, so the first answer has no question; "
                "put a message of the user or the system before it, or give it weight 0"
            )
        before = rendered(messages[:i], tokenizer, chat.tools, opened=True)
        after = rendered(messages[: i + 1], tokenizer, chat.tools)
        # Each text must continue the previous one, or the turns cannot be cut from the whole.
        if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
            break
        segments += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    else:
        return (*segments, (whole[len(done) :], False)) if done != whole else tuple(segments)
    before = rendered(messages[:-1], tokenizer, chat.tools, opened=True)
    if not whole.startswith(before):
        raise ValueError(
            "the chat template does not write the last answer after its generation prompt; use "
            "task completion with the text as the model expects it"
        )
    return (before, False), (whole[len(before) :], messages[-1].get("weight") != 0)
