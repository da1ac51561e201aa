"""Damage to files as hypothesis draws it: bytes, values at a path of JSON, other kinds of file."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

DEEP = 100_000
CONTENTS = (
    *(b"", b" ", b"null", b"[]", b"{}", b"0", b'"text"', b"[[]]", b"[null]", b"\xff\xfe{}", b"\0"),
    b"\0" * 100_000,
    b"[" * DEEP,
    b'{"a":' * DEEP,
    b"[" * 900 + b"]" * 900,
    b"- " * DEEP,
    b"9" * 10_000,
    b'{"format": NaN}',
    b'{"global_step": Infinity, "step": 1e999}',
    b'{"peft_type": "LORA", "r": ' + b"9" * 1000 + b"}",
    b'"\\ud800"',
    b'{"\\ud800": "\\udfff", "step": "\\ud800"}',
    b"\xef\xbb\xbf{}",
    "{}".encode("utf-16"),
    struct.pack("<Q", 1 << 62) + b"{}",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
)
"""Contents that fit no file of zofo."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 4_000_000, 1 << 31, 1 << 63, 1 << 70, 10**400),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "0", "lora", "LORA", "none", "../..", "/dev/zero", "\ud800", "\0", "a" * 5000, "[x]"),
    *("(a+)+b", "(.*)*x", "(", "*", "[link=x]", "\x1b[2J", "auto", "nan", "base", "missing/model"),
    *([], [1], [None], ["q_proj"], [[]], {}, {"a": 1}, {"q_proj": 10**9}, {"": ""}),
    [[[[[[]]]]]] * 3,
    ["x"] * 2000,
)
"""Values of every type that JSON, as Python reads it, and YAML can hold."""

FRACTION = st.integers(0, 9_999).map(lambda number: number / 10_000)
BYTES = st.one_of(
    st.tuples(st.just("cut"), FRACTION),
    st.tuples(st.just("flip"), FRACTION, st.integers(0, 7)),
    st.tuples(st.just("zero"), FRACTION, FRACTION),
    st.tuples(st.just("insert"), FRACTION, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("replace"), st.sampled_from(CONTENTS)),
)
KINDS = st.tuples(st.sampled_from(("delete", "folder", "fifo", "dangling", "itself", "device")))
VALUE = st.tuples(
    st.sampled_from(("set", "remove", "wrap", "add")), FRACTION, st.sampled_from(VALUES)
)
DAMAGE = st.one_of(BYTES, KINDS, VALUE, VALUE)


def damage(path: Path, change: tuple[Any, ...]) -> None:
    """Change a file; what does not apply to its type changes nothing."""
    how = change[0]
    if how in ("set", "remove", "wrap", "add"):
        path.write_bytes(with_other_value(path, change))
    elif how in ("cut", "flip", "zero", "insert", "replace"):
        path.write_bytes(other_bytes(path.read_bytes(), change))
    elif how != "nothing":
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how == "fifo":
            os.mkfifo(path)
        elif how != "delete":
            path.symlink_to({"dangling": "nowhere", "itself": path, "device": "/dev/zero"}[how])


def other_bytes(content: bytes, change: tuple[Any, ...]) -> bytes:
    how, *rest = change
    if how == "replace":
        return bytes(rest[0])
    at = int(rest[0] * len(content))
    if how == "cut":
        return content[:at]
    if how == "insert":
        return content[:at] + rest[1] + content[at:]
    if how == "zero":
        end = at + int(rest[1] * (len(content) - at))
        return content[:at] + b"\0" * (end - at) + content[end:]
    return content[:at] + bytes(b ^ 1 << rest[1] for b in content[at : at + 1]) + content[at + 1 :]


def with_other_value(path: Path, change: tuple[Any, ...]) -> bytes:
    """The content of JSON, JSON lines, YAML or a safetensors header with another value in it."""
    content = path.read_bytes()
    if path.suffix == ".json":
        return json.dumps(changed(json.loads(content), change)).encode()
    if path.suffix in (".yaml", ".yml"):
        text = yaml.safe_dump(changed(yaml.safe_load(content), change), allow_unicode=True)
        return text.encode("utf-8", "surrogatepass")
    if path.suffix in (".jsonl", ".ndjson"):
        lines = changed([json.loads(line) for line in content.splitlines()], change)
        return "\n".join(json.dumps(line) for line in lines).encode()
    if path.suffix == ".safetensors":
        length = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:length])
        record = header.get("__metadata__", {}).get("zofo")
        if record is None:
            header = changed(header, change)
        else:
            header["__metadata__"]["zofo"] = json.dumps(changed(json.loads(record), change))
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[length:]
    return content


def changed(value: Any, change: tuple[Any, ...]) -> Any:
    """A value inside `value` is replaced, removed, wrapped in a list, or has a neighbour added."""
    how, fraction, other = change
    places: list[tuple[Any, Any]] = []

    def visit(inner: Any) -> None:
        keys = inner if isinstance(inner, dict) else range(len(inner))
        for key in keys:
            places.append((inner, key))
            if isinstance(inner[key], dict | list):
                visit(inner[key])

    if isinstance(value, dict | list):
        visit(value)
    if not places or (how == "set" and fraction < 0.02):
        return other
    holder, key = places[int(fraction * len(places))]
    if how == "remove":
        del holder[key]
    elif how == "wrap":
        holder[key] = [holder[key]]
    elif how == "add" and isinstance(holder, dict):
        holder[str(other)[:99]] = other
    else:
        holder[key] = other
    return value


def restore(path: Path, content: bytes) -> None:
    """Put a regular file back in place of whatever stands there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
