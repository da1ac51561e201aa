"""A hostile configuration gives one clear error and never runs code."""

from __future__ import annotations

import pytest

from tests.support.damage import NEVER, refused
from zofo.config.load import load_config
from zofo.errors import UserError

pytestmark = pytest.mark.usefixtures("own_working_folder")

TOUCH = f"touch {NEVER}"
YAML = {
    "an object": f"!!python/object/apply:os.system ['{TOUCH}']",
    "an object in a value": f"steps: !!python/object/apply:os.system ['{TOUCH}']",
    "a name": "method: !!python/name:os.system ''",
    "a module": "method: !!python/module:antigravity ''",
    "an instance": f"!!python/object/new:subprocess.Popen [['touch', '{NEVER}']]",
    "a tuple": "task: !!python/tuple [1, 2]",
    "an unknown tag": "steps: !evil 3",
    "aliases that multiply": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{n}: &{n} [{', '.join(['*' + m] * 9)}]\n"
        for m, n in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "an alias of itself": "task: &t {train: *t}",
    "an alias": "seed: &s 1\nsteps: *s",
    "deep nesting": "task: " + "[" * 5_000,
    "deep nesting that closes": "task: " + "[" * 3_000 + "]" * 3_000,
    "deep nesting in blocks": "".join(" " * n + "a:\n" for n in range(2_000)),
    "a huge number": "steps: " + "9" * 9_999,
    "a large number": "steps: " + "9" * 400,
    "a number in base 60": "steps: " + "59:" * 400 + "59",
    "a date that is none": "steps: 2026-99-99",
    "a date": "steps: 2026-01-01",
    "binary": "steps: !!binary '*'",
    "NaN": "eps: .nan",
    "infinity": "adapter_lr: .inf",
    "a list": "- 1",
    "text": "steps",
    "two documents": "steps: 1\n---\nsteps: 2",
    "a key that is a list": "? [a]\n: 1",
    "a merge of nothing": "<<: 1",
    "control characters": "steps: \x00",
    "a list for a section": "task: [1]",
    "long text for a number": "steps: " + "x" * 100_000,
    "a deep value for a number": "steps: " + "{a: " * 80 + "1" + "}" * 80,
    "a broken map of rates": "base_lr: {a: [1]}",
}


@pytest.mark.parametrize("text", YAML.values(), ids=YAML)
def test_hostile_yaml(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 5000
    assert not NEVER.exists()


def test_configurations_that_are_no_text(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"steps: \xff\xfe\n")
    refused(lambda: load_config(tmp_path / "run.yaml"), "cannot be read")
    refused(lambda: load_config(tmp_path), "is a folder")
