"""Conversations: tools, weights, missing values, and those that are too long."""

import json

import datasets
import pytest

from tests.support.hub_folders import make_tokenizer
from zofo.errors import UserError
from zofo.tasks.encode import Encoder, NothingToLearnError
from zofo.tasks.generate import segments_of, turn_ends
from zofo.tasks.load import load_splits
from zofo.tasks.spec import Chat, Completion, TaskSpec

TOOLS_TEMPLATE = (
    "{% if tools %}<|system|>Tools: {{ tools | tojson }}<eos>{% endif %}"
    "{% for m in messages %}"
    "<|{{ 'user' if m['role'] == 'tool' else m['role'] }}|>{{ m['content'] }}"
    # Llama 3.1's asks whether there is such a key, whatever its value.
    "{% if 'tool_calls' in m %}{% for c in m.tool_calls %}"
    "<call>{{ c.function.name }}({{ c.function.arguments | tojson }})</call>"
    "{% endfor %}{% endif %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def called(name, **arguments):
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


def tool(name, *arguments):
    properties = {argument: {"type": "string"} for argument in arguments}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.fixture
def tokenizer():
    found = make_tokenizer()
    found.chat_template = TOOLS_TEMPLATE
    return found


def read(path, rows, tokenizer):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = TaskSpec(name="chat", train=str(path), num_dev=1, num_test=1)
    splits = load_splits(spec, tokenizer=tokenizer)
    return {row.row: row for row in (*splits.train, *splits.dev, *splits.test)}


def learnt(row):
    return [text for text, is_learnt in row.segments if is_learnt]


def tooled(i):
    arguments = {"city": "Paris"} if i % 2 else {"place": "here", "day": "1"}
    return {
        "messages": [
            user(f"weather {i}?"),
            assistant(None, tool_calls=called("weather", **arguments)),
            {"role": "tool", "content": "rain"},
            assistant("It rains."),
        ],
        "tools": [tool("weather", *arguments)],
    }


def test_chats_that_call_other_tools_are_no_duplicates(tmp_path, tokenizer):
    def chat(name, **arguments):
        calls = called(name, **arguments)
        return {"messages": [user("weather?"), assistant("", tool_calls=calls)]}

    different = [chat("weather", day=str(i)) for i in range(4)] + [chat("rain", day="0"), chat("x")]
    different.append({"messages": [user("weather?"), assistant("")]})
    same = [chat("x"), chat("rain", day="0"), chat("weather", day="3")]
    rows = read(tmp_path / "a.jsonl", [*different, *same], tokenizer)
    assert len(rows) == len(different)
    assert len({row.text for row in rows.values()}) == len(different)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tools_are_shown_and_a_missing_value_is_no_value(tmp_path, tokenizer, suffix):
    rows = read(tmp_path / f"a{suffix}", [tooled(i) for i in range(6)], tokenizer)
    for number, row in rows.items():
        example = tooled(number - 1)
        arguments = example["messages"][1]["tool_calls"][0]["function"]["arguments"]
        first = row.segments[0][0]
        assert first.startswith("<|system|>Tools: [{")
        assert "null" not in first
        properties = example["tools"][0]["function"]["parameters"]["properties"]
        assert json.dumps(sorted(properties)) == json.dumps(sorted(arguments))
        assert all(f'"{name}"' in first for name in arguments)
        assert '"city"' in first or "city" not in arguments
        call, answer = learnt(row)
        assert json.loads(call[call.index("(") + 1 : call.rindex(")")]) == arguments
        assert answer == "It rains.<eos>"


def test_tools_as_text_and_without_a_template_that_shows_them(tmp_path, tokenizer):
    rows = [{**tooled(i), "tools": json.dumps(tooled(i)["tools"])} for i in range(6)]
    rows[0]["tools"], rows[1]["tools"] = None, ""
    found = read(tmp_path / "a.jsonl", rows, tokenizer)
    assert [("Tools: [{" in found[n].segments[0][0]) for n in (1, 2, 3)] == [False, False, True]
    rows[2]["tools"], rows[3]["tools"] = "[{", {"name": "x"}
    with pytest.raises(UserError, match=r"row 3: 'tools' is not valid JSON[\s\S]*row 4: .* a list"):
        read(tmp_path / "b.jsonl", rows, tokenizer)
    plain = make_tokenizer()
    with pytest.raises(UserError, match="template does not write tool_calls; choose a model"):
        read(tmp_path / "c.jsonl", [tooled(i) for i in range(6)], plain)
    rows = [{"messages": [user(f"{i}"), assistant("a")], "tools": [tool("x")]} for i in range(6)]
    with pytest.warns(UserWarning, match="'tools', which the chat template does not show"):
        read(tmp_path / "d.jsonl", rows, plain)


def test_a_message_of_weight_0_is_context(tmp_path, tokenizer):
    def row(i, *weights):
        messages = []
        for turn, weight in enumerate(weights):
            messages += [user(f"q {i} {turn}"), assistant(f"a {turn}", weight=weight)]
        return {"messages": messages}

    rows = [row(0, 0, 1), row(1, 1, 0), row(2, None, 1.0), row(3, 0, 0), row(4, 1)]
    found = read(tmp_path / "a.jsonl", [*rows, row(5, 1)], tokenizer)
    expected = [["a 1<eos>"], ["a 0<eos>"], ["a 0<eos>", "a 1<eos>"], [], ["a 0<eos>"]]
    assert [learnt(found[n]) for n in range(1, 6)] == expected
    whole = "".join(text for text, _ in found[2].segments)
    assert whole == "<|user|>q 1 0<eos><|assistant|>a 0<eos><|user|>q 1 1<eos><|assistant|>a 1<eos>"
    # Nothing is computed for what follows the last answer that is learnt.
    encoded = Encoder(tokenizer)(found[2])
    assert tokenizer.decode(encoded.rows[0]).endswith("a 0")
    with pytest.raises(NothingToLearnError, match=r"row 4: .* weight 0"):
        Encoder(tokenizer)(found[4])


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (assistant(None), "content None, not a text; write it as one text"),
        (
            assistant([{"type": "text", "text": "a"}]),
            r"content .*, not a text; write it as one text",
        ),
        (assistant("a", weight=0.5), "weight 0.5; use 1"),
    ],
)
def test_messages_that_are_wrong_name_a_remedy(tmp_path, tokenizer, message, words):
    rows = [{"messages": [user(f"{i}"), assistant("a")]} for i in range(6)]
    rows[2]["messages"][1] = message
    with pytest.raises(UserError, match=f"row 3: message 2 has {words}"):
        read(tmp_path / "a.jsonl", rows, tokenizer)


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize(
    "values",
    [
        *({}, {"text": "a"}, {"messages": None}, {"messages": []}, {"messages": [[[1]]]}),
        {"messages": {"role": "user"}},
        {"messages": [{"role": {"a": ["user"]}, "content": "a"}]},
        {"messages": [user("a"), {"role": "assistant", "content": {"a": [1]}}]},
        {"messages": [user("a"), assistant("a", weight=[1])]},
        {"messages": [user("a"), assistant("a")], "tools": "[" * 100_000},
    ],
    ids=lambda values: str(values)[:60],
)
def test_rows_without_messages_and_nested_values_are_one_error(tmp_path, tokenizer, values, row):
    rows = [{"messages": [user(f"{i}"), assistant("a")]} for i in range(6)]
    rows[row] = values
    with pytest.raises(UserError, match=f"row {row + 1}: |has no column 'messages'"):
        read(tmp_path / "a.jsonl", rows, tokenizer)


def test_a_conversation_that_begins_with_the_assistant(tmp_path, tokenizer):
    rows = [{"messages": [assistant("Hi"), user(f"{i}"), assistant("a")]} for i in range(6)]
    with pytest.raises(UserError, match=r"begins with the assistant, .* or give it weight 0"):
        read(tmp_path / "a.jsonl", rows, tokenizer)
    for row in rows:
        row["messages"][0]["weight"] = 0
    found = read(tmp_path / "b.jsonl", rows, tokenizer)
    assert found[1].segments[0] == ("<|assistant|>Hi<eos><|user|>0<eos><|assistant|>", False)


def long_chat(num=40, system=True):
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    for i in range(num):
        messages += [user(f"question {i} about the film"), assistant(f"answer {i} is great")]
    return messages


def completion(messages, tokenizer):
    chat = Chat(messages)
    return Completion(segments_of(chat, tokenizer), "", 1, is_rendered=True, chat=chat)


@pytest.mark.parametrize("system", [True, False])
def test_a_long_conversation_loses_its_first_turns(tokenizer, system):
    messages = long_chat(12, system=system)
    row = completion(messages, tokenizer)
    first = int(system)
    options = {"tokenize": True, "return_dict": False}
    shorter = [
        tokenizer.apply_chat_template(messages[:first] + messages[first + 2 * num :], **options)
        for num in range(12)
    ]
    for length in (*range(48, 112, 3), len(shorter[0]) - 1, len(shorter[0])):
        encoded = Encoder(tokenizer, max_length=length)(row)
        ids = [*encoded.rows[0], encoded.targets[0][-1][2]]
        assert ids == next(kept for kept in shorter if len(kept) <= length)
        assert encoded.is_shortened == (ids != shorter[0])
        answers = tokenizer.decode([token for _, _, token in encoded.targets[0]])
        num = ids.count(tokenizer.convert_tokens_to_ids("<|assistant|>"))
        assert answers.count("answer") == answers.count("<eos>") == num


def test_an_answer_that_is_cut_is_not_learnt(tokenizer):
    """One turn with several answers cannot lose turns, so it loses tokens."""
    messages = [user("weather?")]
    for i in range(8):
        calls = called("weather", city=f"{i}")
        messages += [assistant("", tool_calls=calls), {"role": "tool", "content": "rain " * i}]
    row = completion([*messages, assistant("It rains.")], tokenizer)
    for length in range(12, 120, 5):
        encoded = Encoder(tokenizer, max_length=length)(row)
        learnt = tokenizer.decode([token for _, _, token in encoded.targets[0]])
        assert len(encoded.rows[0]) < length
        assert encoded.is_shortened
        assert learnt.count("<call>") == learnt.count("</call>") == learnt.count("<eos>") - 1
    with pytest.raises(NothingToLearnError, match="longer than max_length 8; raise"):
        Encoder(tokenizer, max_length=8)(completion([user("a"), assistant("b " * 9)], tokenizer))


def test_turns_after_the_last_learnt_answer_need_no_room(tokenizer):
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    messages += [m if m["role"] == "user" else {**m, "weight": 0} for m in long_chat(9, False)]
    row = completion(messages, tokenizer)
    encoded = Encoder(tokenizer, max_length=12)(row)
    assert tokenizer.decode(encoded.rows[0]).endswith("<|user|>c<eos><|assistant|>d")
    assert not encoded.is_shortened
    assert Encoder(tokenizer, max_length=8)(row).is_shortened


CHATML = "{% for m in messages %}[{{ m.role }}]{{ m.content }}"


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("<eos>", ["<eos>"]),
        ("<|system|>\n", ["<|system|>"]),  # as <|im_end|> in a base whose own end is another
        (" <|system|>", ["<|system|>"]),
        ("\n", []),
        ("[/INST]", []),
        ("", []),
    ],
)
def test_the_token_that_ends_a_turn(end, expected):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML + end + "{% endfor %}"
    assert tokenizer.convert_ids_to_tokens(list(turn_ends(tokenizer))) == expected


def test_no_token_ends_a_turn_of_a_template_that_refuses():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert turn_ends(tokenizer) == ()


def test_of_joined_columns_the_last_is_learnt(tmp_path, tokenizer):
    """TRL's prompt and completion as messages."""
    before = [user("a"), assistant("b"), user("c")]
    rows = [{"prompt": before, "completion": [assistant(f"d{i}")]} for i in range(4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = TaskSpec(
        name="chat", train=str(path), messages="prompt+completion", num_dev=1, num_test=1
    )
    splits = load_splits(spec, tokenizer=tokenizer)
    for row in (*splits.train, *splits.dev, *splits.test):
        assert [text for text, is_learnt in row.segments if is_learnt] == [f"d{row.row - 1}<eos>"]
    wrong = spec.model_copy(update={"messages": "prompt+chosen"})
    with pytest.raises(UserError, match="no column 'chosen'"):
        load_splits(wrong, tokenizer=tokenizer)
