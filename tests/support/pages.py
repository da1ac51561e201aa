"""Reads a report's page from its HTML."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class Found:
    """The content of a page: tables by caption, the data block, tags, and text."""

    tables: list[dict] = field(default_factory=list)
    data: dict = field(default_factory=dict)
    tags: list[tuple[str, dict]] = field(default_factory=list)
    text: str = ""

    def table(self, words):
        """Return the rows of the table whose caption has these words.

        Each row is a dict key -> (text, unrounded value).
        """
        (table,) = [t for t in self.tables if words in t["caption"]]
        return [dict(zip(table["keys"], row, strict=True)) for row in table["rows"]]


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.inside, self.is_data = Found(), [], False

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.found.tags.append((tag, given))
        if tag == "table":
            self.found.tables.append({"caption": "", "keys": [], "rows": []})
        if tag == "tr" and "thead" not in self.inside:
            self.found.tables[-1]["rows"].append([])
        if "thead" in self.inside and tag == "th":
            self.found.tables[-1]["keys"].append(given["data-key"])
        elif tag in ("th", "td"):
            self.found.tables[-1]["rows"][-1].append(["", given.get("data-value")])
        self.is_data = given.get("id") == "data"
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, text):
        if self.is_data and self.inside[-1] == "script":
            self.found.data = json.loads(text)
        elif "script" in self.inside or "style" in self.inside:
            return
        elif "caption" in self.inside:
            self.found.tables[-1]["caption"] += text
        elif "tbody" in self.inside and ("td" in self.inside or "th" in self.inside):
            self.found.tables[-1]["rows"][-1][-1][0] += text
        self.found.text += text


def read_page(path):
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    for table in reader.found.tables:
        table["caption"] = " ".join(table["caption"].split())
        for row in table["rows"]:
            for cell in row:
                cell[0] = " ".join(cell[0].split())
                with contextlib.suppress(TypeError, ValueError):
                    cell[1] = float(cell[1])
    return reader.found
