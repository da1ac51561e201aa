"""Files that could be read in two ways are refused, with the line and the remedy."""

import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest

from tests.support.damage import make_special, refused
from zofo.errors import UserError
from zofo.tasks.files import MAX_BYTES, READERS
from zofo.tasks.load import load_splits
from zofo.tasks.rows import read_table
from zofo.tasks.spec import TaskSpec

TEXTS = ["plain", "café – “film” 🎬", "he said 'no'", 'a 5" disc', '"Great" film', "it, too; or|so"]
ROWS = [{"text": f"{text} {i}", "label": "ab"[i % 2]} for i, text in enumerate(TEXTS)]


def written(path, rows=ROWS, encoding="utf-8"):
    frame = pd.DataFrame(rows)
    if path.suffix == ".json":
        text = json.dumps(rows, ensure_ascii=False)
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = frame.to_csv(index=False, sep="\t" if path.suffix == ".tsv" else ",")
    path.write_bytes(text.encode(encoding))
    return str(path)


def refusal(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read_table(str(path))
    return str(error.value)


@pytest.mark.parametrize("suffix", [s for s in READERS if s not in (".parquet", ".ndjson")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-mark"])
def test_marked_encodings_are_read(tmp_path, suffix, encoding):
    rows = ROWS
    if encoding == "utf-16-be-mark":
        path = tmp_path / f"a{suffix}"
        written(path, rows)
        path.write_bytes(("\ufeff" + path.read_text("utf-8")).encode("utf-16-be"))
        table = read_table(str(path))
    else:
        table = read_table(written(tmp_path / f"a{suffix}", rows, encoding))
    assert [row for _, row in table.rows] == rows


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_other_encodings_are_refused_with_the_line_and_a_command(tmp_path, suffix):
    path = Path(written(tmp_path / f"a{suffix}", [*ROWS[:1], {"text": "café", "label": "a"}]))
    said = refusal(path, path.read_text("utf-8").encode("cp1252"))
    line = 2 if suffix == ".jsonl" else 3
    assert f"a{suffix}, line {line}: holds the byte 0xe9, which is not utf-8" in said
    assert f"iconv -f WINDOWS-1252 -t UTF-8 a{suffix} > utf8-a{suffix}" in said
    said = refusal(path, "text,label\nx,a\n".encode("utf-16-le"))
    assert "line 1: holds a zero byte" in said
    assert "iconv -f UTF-16LE" in said


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "text,label\nfine,a\none, two,b\n", "line 3: the number of its fields is 3"),
        ("a.csv", "text,label\none, two,b\nfine,a\n", "line 2: the number of its fields is 3"),
        ("a.csv", "text,label\nfine,a,\nfine,b,\n", "line 2: the number of its fields is 3"),
        ("a.csv", 'text,label\n"two\nlines",a\n\nshort\n', "line 5: the number of its fields is 1"),
        ("a.csv", 'text,label\nx,a\n"Great" film,b\n', "line 3: .*double each mark"),
        ("a.csv", 'text,label\n"a \\"great\\" film",b\n', "line 2: .*double each mark"),
        ("a.csv", 'text,label\n"never closed,b\nx,a\n', "line 2: unexpected end of data"),
        ("a.csv", 'text,label\n"Oh,a\nfine,b\nend",a\nx,a\ny,b\n', "row 1: .* of 3 lines"),
        ("a.csv", 'label,text\nx,1\na,"Oh\nb,fine\na,end"\na,x\nb,y\n', "row 2: .* of 3 lines"),
        ("a.csv", 'id,text,label\n1,"Oh,a\n2,end",b\n3,x,a\n4,y,b\n', "row 1: .* of 2 lines"),
        ("a.csv", "text,label,label\nx,a,b\n", "'label' names two columns"),
        ("a.csv", "text;label\nx;a\n", "separated by semicolons; a .csv file has commas"),
        ("a.csv", "text\tlabel\nx\ta\n", "separated by tabs"),
        ("a.tsv", "text,label\nx,a\n", "separated by commas; a .tsv file has tabs"),
        ("a.tsv", "text\tlabel\nx\ta\tb\n", "line 2: the number of its fields is 3.*one line"),
        ("a.tsv", 'text\tlabel\n"two\nlines"\ta\n', "line 2: the number of its fields is 1"),
        ("a.json", '{"text": "x"}\n{"text": "y"}\n', "one object a line name the file .jsonl"),
        ("a.json", '{"text": "x"}', "name the file .jsonl"),
        ("a.jsonl", '[{"text": "x"}]\n', "a list of objects belongs into a .json file"),
        ("a.jsonl", '[\n{"text": "x"}\n]', "row 1: .*belongs into a .json file"),
        ("a.json", "[" * 100_000, "not valid JSON .maximum recursion depth.*list of objects"),
    ],
)
def test_what_is_wrong_names_its_line_and_the_remedy(tmp_path, name, text, words):
    assert re.search(words, refusal(tmp_path / name, text))


def test_quotes_in_tsv_are_text_unless_all_fields_with_quotes_are_quoted(tmp_path):
    path = tmp_path / "a.tsv"
    texts = ["plain", '"opened', 'said "yes" twice', '"all of it"', 'closed"', '""']
    path.write_text("text\tlabel\n" + "".join(f"{text}\ta\n" for text in texts))
    assert [row["text"] for _, row in read_table(str(path)).rows] == texts
    texts = ['a "word"', "a\ttab", '"']  # a spreadsheet quotes these, and doubles the quotes
    written(path, [{"text": text, "label": "a"} for text in texts])
    assert [row["text"] for _, row in read_table(str(path)).rows] == texts


def test_every_row_of_a_tsv_is_read(tmp_path):
    rows = [f"{chr(34) * (i in (5, 15))}row {i}\t{'ab'[i % 2]}" for i in range(40)]
    (tmp_path / "a.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    splits = load_splits(TaskSpec(name="classification", train=str(tmp_path / "a.tsv")))
    assert len(splits.train) + len(splits.dev) + len(splits.test) == 40


def test_a_field_may_be_long(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f'text,label\n"{"x" * 200_000}",a\n')
    assert len(read_table(str(path)).rows[0][1]["text"]) == 200_000


@pytest.mark.parametrize(
    "row",
    [
        {"text": "cut \ud83d", "label": "a"},
        {"text": "x", "label": "\udc00"},
        {"text": "x", "label": "a", "note": {"deep": ["\ud83d"]}},
        {"text": "x", "label": "a", "\ud83d": "name"},
        {"messages": [{"role": "user", "content": "\ude00"}]},
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(tmp_path, row, suffix):
    path = tmp_path / f"a{suffix}"
    text = "\n".join(map(json.dumps, (ROWS[0], row)))
    path.write_text(f"[{text.replace(chr(10), ',')}]" if suffix == ".json" else text)
    with pytest.raises(UserError, match=r"row 2: .*half of a surrogate pair.*remove it"):
        read_table(str(path))
    path.write_text('[{"text": "\\ud83d\\ude00"}]' if suffix == ".json" else '{"text": "😀"}')
    assert read_table(str(path)).rows


@pytest.mark.parametrize("value", [["x"], {"a": "x"}, 5, None, True, 0.5])
def test_a_value_that_is_no_text_is_refused_where_text_is_expected(tmp_path, value):
    rows = [*ROWS, {"text": value, "label": "a"}]
    path = tmp_path / "a.jsonl"
    for name, columns in (("classification", ("text", "label")), ("completion", ("label", "text"))):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"prompt": columns[0], "completion": columns[1]} if name == "completion" else {}
        with pytest.raises(UserError, match=r"row 7: 'text' is .*, not a text"):
            load_splits(TaskSpec(name=name, train=str(path), **options))


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "dangling", "folder"])
def test_only_regular_files_are_opened(tmp_path, suffix, kind):
    path = tmp_path / f"a{suffix}"
    make_special(path, kind)
    assert "the data file" in refused(lambda: read_table(str(path)))


@pytest.mark.parametrize("suffix", READERS)
def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a{suffix}"
    path.touch()
    os.truncate(path, MAX_BYTES + 1)  # without any blocks on the disk
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda _: pytest.fail("read"))
    words = "cannot be read" if suffix == ".parquet" else f"larger than {MAX_BYTES} bytes"
    refused(lambda: read_table(str(path)), words)


@pytest.mark.parametrize("limit", ["MAX_BYTES", "MAX_ROWS"])
def test_a_small_parquet_file_of_many_rows(tmp_path, monkeypatch, limit):
    pd.DataFrame({"text": ["a"] * 5000}).to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(f"zofo.tasks.files.{limit}", 100)
    monkeypatch.setattr("pandas.read_parquet", lambda _: pytest.fail("read"))
    refused(lambda: read_table(str(tmp_path / "a.parquet")), "split it")


@pytest.mark.parametrize(
    "text",
    [
        'text,label\n"a, b\nc, d\ne",a\nx,a\ny,b\n',  # lines with commas, and no labels
        'text,label\n"one\ntwo",a\nx,a\n',
        'text,label\n"Oh,a\nfine\nend",a\nx,a\n',  # a line without a label
        'id,text\n1,"Oh\n2,end"\n3,x\n',  # nothing tells numbers of rows from text
        'text\n"one\ntwo"\nx\n',
    ],
)
def test_texts_with_line_breaks_are_read(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    assert any("\n" in value for value in read_table(str(tmp_path / "a.csv")).rows[0][1].values())
