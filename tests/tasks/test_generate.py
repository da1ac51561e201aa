import json

import pytest

from tests.support.hub_folders import make_tokenizer
from zofo.errors import UserError
from zofo.tasks.encode import Encoder
from zofo.tasks.load import load_splits
from zofo.tasks.spec import TaskSpec


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def conversation(i, turns=1):
    messages = [{"role": "system", "content": "Be brief."}]
    for t in range(turns):
        messages += [
            {"role": "user", "content": f"What is {i}?"},
            {"role": "assistant", "content": f"Answer {i} {t}"},
        ]
    return {"messages": messages}


def chats(tmp_path, rows, tokenizer=None):
    spec = TaskSpec(name="chat", train=write(tmp_path / "a.jsonl", rows), num_dev=1, num_test=1)
    return load_splits(spec, tokenizer=tokenizer or make_tokenizer())


def learnt_text(tokenizer, encoded):
    return tokenizer.decode([token for _, _, token in encoded.targets[0]])


def test_the_assistants_words_are_learnt_and_nothing_else(tmp_path):
    tokenizer = make_tokenizer()
    splits = chats(tmp_path, [conversation(i, turns=2) for i in range(6)], tokenizer)
    row = splits.train[0]
    number = row.text.split("What is ")[1][0]
    encoded = Encoder(tokenizer)(row)
    assert learnt_text(tokenizer, encoded) == (f"Answer {number} 0<eos>Answer {number} 1<eos>")
    ids = encoded.rows[0]
    for _, position, token in encoded.targets[0][:-1]:
        assert ids[position + 1] == token


def test_a_template_that_rewrites_history_teaches_the_last_turn(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}"
        "<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    splits = chats(tmp_path, [conversation(i, turns=2) for i in range(6)], tokenizer)
    assert learnt_text(tokenizer, Encoder(tokenizer)(splits.train[0])).endswith(" 1<eos>")
    assert len(splits.train[0].segments) == 2


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "list of messages"),
        ([{"role": "bot", "content": "x"}], "role 'bot'"),
        ([{"role": "user", "content": None}], "not a text"),
        ([{"role": "user", "content": "x"}], "last message must be the assistant's"),
    ],
)
def test_messages_that_are_wrong(tmp_path, messages, words):
    rows = [*(conversation(i) for i in range(5)), {"messages": messages}]
    with pytest.raises(UserError, match=f"row 6: .*{words}"):
        chats(tmp_path, rows)


def test_a_tokenizer_without_a_template(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        chats(tmp_path, [conversation(i) for i in range(5)], tokenizer)


def test_completions_are_joined_as_they_are_and_end(tmp_path):
    rows = [{"prompt": f"The film {i} is", "completion": f" good {i}"} for i in range(6)]
    path = write(tmp_path / "a.jsonl", rows)
    splits = load_splits(TaskSpec(name="completion", train=path, num_dev=1, num_test=1))
    tokenizer = make_tokenizer()
    row = splits.train[0]
    encoded = Encoder(tokenizer)(row)
    number = row.text[9]
    assert learnt_text(tokenizer, encoded) == f" good {number}<eos>"
    # The model predicts the last target but never reads it.
    assert tokenizer.decode(encoded.rows[0]) == f"The film {number} is good {number}"


def test_long_prompts_lose_their_beginning_and_long_completions_are_refused(tmp_path):
    tokenizer = make_tokenizer()
    rows = [{"prompt": "the film " * 30 + f"{i}:", "completion": " good"} for i in range(6)]
    splits = load_splits(
        TaskSpec(name="completion", train=write(tmp_path / "a.jsonl", rows), num_dev=1, num_test=1)
    )
    encoded = Encoder(tokenizer, max_length=12)(splits.train[0])
    assert len(encoded.rows[0]) == 11
    assert learnt_text(tokenizer, encoded) == " good<eos>"
    rows = [{"prompt": f"{i}", "completion": " good" * 40} for i in range(6)]
    splits = load_splits(
        TaskSpec(name="completion", train=write(tmp_path / "b.jsonl", rows), num_dev=1, num_test=1)
    )
    with pytest.raises(UserError, match="longer than max_length"):
        Encoder(tokenizer, max_length=12)(splits.train[0])
