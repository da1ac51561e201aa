"""HTML documents in one file, which load nothing from the network.

Anyone may have chosen the names in a run folder. Therefore the templates escape and isolate every
name (`zofo.pages.text`), and the data lie in a block that is not a script. A content security
policy allows only the two scripts of the page, which it identifies by their digests.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from zofo.disk.files import problem_of_name, problem_of_target, require_regular
from zofo.errors import UserError
from zofo.pages.text import isolated


def render_document(template: str, *, mark: str, **context: Any) -> str:
    """The text of a page: a template with styles, scripts and policy.

    Args:
        template: name of the template in the assets.
        mark: an element that identifies the kind of page.
        context: variables of the template; `json_of` makes `data`.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    assets = resources.files("zofo.pages") / "assets"

    def read(name: str) -> str:
        return (assets / name).read_text(encoding="utf-8")

    # HTML parsers turn "\r" into "\n", after which a script would not match its digest.
    scripts = [text.replace("\r", "") for text in (get_plotlyjs(), read("report.js"))]
    environment = Environment(
        loader=FunctionLoader(read),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: isolated(value) if isinstance(value, str) else value,
    )
    return environment.get_template(template).render(
        **context, mark=mark, policy=_policy(scripts), style=read("report.css"), scripts=scripts
    )


def json_of(value: Any) -> str:
    """JSON that cannot end the HTML element around it."""
    text = json.dumps(isolated(value), ensure_ascii=False, allow_nan=False)
    # U+2028 and U+2029 end a line in older JavaScript, and "<" could begin a closing tag.
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def check_target(path: Path, mark: str, option: str = "--to", name: str = "report.html") -> None:
    """Refuse to replace a file that is not an earlier report.

    An earlier report has `mark` in its first 4 KiB. `option`, the command-line option that gives
    the path, and `name`, a name for a file, go into the error message.

    Raises:
        UserError: if `path` is a folder or a file without the mark, or cannot be written.
    """
    problem = problem_of_name(path)
    if problem is not None:
        raise UserError(problem)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file, such as {option} {path / name}")
    problem = problem_of_target(path)
    if problem is not None:
        raise UserError(problem)
    if not path.exists():
        return
    require_regular(path)
    with path.open("rb") as file:
        if mark.encode() not in file.read(4096):
            raise UserError(f"{path} exists and is no report of zofo; choose another {option}")


def _policy(scripts: Sequence[str]) -> str:
    digests = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in scripts
    )
    return (
        f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
