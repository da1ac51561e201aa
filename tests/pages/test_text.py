"""No name on a page changes how the text around it reads."""

import json

import pytest

from tests.support.run_folders import write_run
from zofo.pages.document import json_of
from zofo.pages.text import isolated
from zofo.report.data import make_report
from zofo.report.page import render

HEBREW, ARABIC = "\u05d0\u05d1\u05d2", "\u0627\u0628"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rte", "rte"),
        ("né, 日本, 👩‍👩", "né, 日本, 👩‍👩"),
        ("a\u202ecba\u2066\x1b[2J\x9b", "a\ufffdcba\ufffd\ufffd[2J\ufffd"),
        (f"task {HEBREW} 3 of 4", f"task \u2068{HEBREW}\u2069 3 of 4"),
        (
            f"{HEBREW}, 3 {ARABIC}. and {ARABIC}",
            f"\u2068{HEBREW}, 3 {ARABIC}\u2069. and \u2068{ARABIC}\u2069",
        ),
        (f"{HEBREW}\u2069\u202e", f"\u2068{HEBREW}\u2069\ufffd\ufffd"),
        ({HEBREW: [1, "x\r", None]}, {f"\u2068{HEBREW}\u2069": [1, "x\ufffd", None]}),
    ],
)
def test_directions_are_isolated(text, shown):
    assert isolated(text) == shown


def test_a_page_has_no_name_that_is_not_isolated(tmp_path):
    name = f"<{HEBREW}>\u202e"
    run = write_run(tmp_path / "run", task=name, model=name)
    page = render(make_report([run]), tmp_path)
    assert f"&lt;\u2068{HEBREW}\u2069&gt;\ufffd" in page
    assert "\u202e" not in page
    assert page.count(HEBREW) == page.count(f"\u2068{HEBREW}\u2069")
    assert json.loads(json_of({name: name})) == {isolated(name): isolated(name)}
