"""The rows of a run are found again in data that has changed, for every kind of task."""

import copy
import json
import random

import pytest
from safetensors.torch import save_file

from tests.support.hub_folders import make_tokenizer
from tests.support.hub_rows import make_row
from zofo.errors import UserError
from zofo.tasks.digests import PARTS, ROWS_FILE, RowDigests
from zofo.tasks.load import load_splits
from zofo.tasks.spec import TaskSpec


def squad_row(i):
    answers = {"text": [f"Rome {i}"], "answer_start": [0]}
    return {"title": "Films", "context": f"Film {i} is long.", "question": "Q?", "answers": answers}


def messages(i, answer="yes"):
    turns = [{"role": "user", "content": f"film {i}?"}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


OWN = {
    "classification": lambda i: {"text": f"film {i}", "label": "ab"[i % 2]},
    "completion": lambda i: {"prompt": f"film {i} is", "completion": f" good {i}"},
    "chat": messages,
}
OTHER_ANSWER = {
    "classification": lambda row: {"label": "ba"["ab".index(row["label"])]},
    "completion": lambda row: {"completion": " bad"},
    "chat": lambda row: {"messages": [*row["messages"][:1], messages(0, "no")["messages"][1]]},
    "agnews": lambda row: {"label": (row["label"] + 1) % 4},
    "cb": lambda row: {"label": (row["label"] + 1) % 3},
    "copa": lambda row: {"label": 1 - row["label"]},
    "squad": lambda row: {"answers": {"text": ["Oslo"], "answer_start": [0]}},
}


class Data:
    """A task whose rows can be replaced."""

    def __init__(self, folder, name):
        self.row = OWN.get(name) or (squad_row if name == "squad" else lambda i: make_row(name, i))
        self.tokenizer = make_tokenizer() if name == "chat" else None
        test = "test" if name == "agnews" else "validation"
        self.files = {"train": folder / "train.jsonl", "test": folder / f"{test}.jsonl"}
        options = {"train": str(self.files["train"]), "test": str(self.files["test"])}
        options = options if name in OWN else {"data_dir": str(folder)}
        self.spec = TaskSpec(name=name, num_train=20, num_dev=6, num_test=8, **options)
        self.rows = {"train": list(map(self.row, range(40)))}
        self.rows["test"] = [self.row(i) for i in range(100, 112)]

    def splits(self, rows, **options):
        for part, path in self.files.items():
            path.write_text("".join(json.dumps(row) + "\n" for row in rows[part]))
        return load_splits(self.spec, tokenizer=self.tokenizer, **options)


@pytest.fixture(params=OTHER_ANSWER)
def data(request, tmp_path):
    return request.param, Data(tmp_path, request.param)


def test_rows_are_found_in_changed_data(data, tmp_path):
    name, data = data
    before = data.splits(data.rows)
    assert (before.changes, before.lost) == ("", "")
    RowDigests.of(before).save(tmp_path)
    known = RowDigests.load(tmp_path)
    assert known == RowDigests.of(before)
    assert data.splits(data.rows, known=known) == before

    more = {part: [*rows, data.row(900 + len(rows))] for part, rows in data.rows.items()}
    for rows in more.values():
        random.Random(1).shuffle(rows)
    plain = data.splits(more)
    assert RowDigests.of(plain) != known
    found = data.splits(more, known=known)
    assert RowDigests.of(found) == known
    for part in PARTS:
        assert [row.text for row in found.part(part)] == [row.text for row in before.part(part)]
    unused = 40 + 12 - 20 - 6 - 8
    assert f"{unused + 2} other rows, which are new or were not used" in found.changes
    assert found.changes in found.notes
    assert not found.lost

    chosen = before.test[0].row - 1
    fewer = copy.deepcopy(data.rows)
    fewer["test"][chosen] |= OTHER_ANSWER[name](fewer["test"][chosen])
    del fewer["train"][before.train[0].row - 1]
    lost = data.splits(fewer, known=known)
    assert (len(lost.train), len(lost.dev), len(lost.test)) == (19, 6, 7)
    assert "1 of 20 train rows missing" in lost.lost
    # What the model shall write is part of the text of these rows.
    how = "missing" if name in ("completion", "chat") else "with another label or spelling"
    assert f"1 of 8 test rows {how}" in lost.lost


def test_data_too_small_to_be_split_is_compared_too(tmp_path):
    data = Data(tmp_path, "classification")
    known = RowDigests.of(data.splits(data.rows))
    few = {part: rows[:2] for part, rows in data.rows.items()}
    assert "of 8 test rows missing" in data.splits(few, known=known).lost


def test_a_damaged_file_is_refused(tmp_path):
    import torch

    assert RowDigests.load(tmp_path) is None
    good = torch.zeros(3, 2, dtype=torch.int64)
    for tensors in (
        {"train": good},
        dict.fromkeys(PARTS, good[:, :1]),
        dict.fromkeys(PARTS, good.int()),
    ):
        copies = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        save_file(copies, tmp_path / ROWS_FILE)
        with pytest.raises(UserError, match="is damaged"):
            RowDigests.load(tmp_path)
    (tmp_path / ROWS_FILE).write_bytes(b"{}")
    with pytest.raises(UserError, match="is damaged"):
        RowDigests.load(tmp_path)


def test_classes_of_a_model_in_another_order(tmp_path):
    data = Data(tmp_path, "agnews")
    known = ("Business", "Sci/Tech", "Sports", "World")
    plain, matched = data.splits(data.rows), data.splits(data.rows, labels=known)
    assert matched.labels == known
    for mine, row in zip(matched.test, plain.test, strict=True):
        assert known[mine.gold] == plain.labels[row.gold]
    assert RowDigests.of(matched) == RowDigests.of(plain)
    with pytest.raises(
        UserError, match=r"'Sci/Tech' \(task agnews\); its classes are Business, Sp"
    ):
        data.splits(data.rows, labels=("Business", "Sports", "World", "Technology"))
