"""Fill the reference from the code while MkDocs builds the site.

A page holds a marker on a line of its own, and the build puts a table in its place:

    <!-- generated: command train -->       usage, arguments and options of a command
    <!-- generated: options task -->        options of a section of the configuration
    <!-- generated: columns runs -->        columns of a table that zofo writes

The build fails if a command, a section or a public name appears on no page.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

import zofo
from zofo.cli.app import app
from zofo.config.schema import RunConfig
from zofo.results.table import COLUMNS, CURVE_COLUMNS, REWARD_COLUMNS
from zofo.smoothness.options import SmoothnessOptions
from zofo.study.spec import StudySpec

ROOT = Path(__file__).parent.parent
MARKER = re.compile(r"^<!-- generated: (\w+) ([\w-]+) -->$", re.MULTILINE)
COPIED = ("*.md", "LICENSE", "examples/*.py", "configs/**/*.yaml", "benchmarks/*.py")
"""Files outside docs/ that a page may link to."""
SECTIONS = {name: f"{name}." for name in ("model", "adapter", "task", "reward", "preference")}


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in r)} |" for r in lines)


def _code(value: Any) -> str:
    """A value as the configuration writes it; nothing for None."""
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def commands() -> dict[str, Any]:
    """The commands by name, as the command line parses them."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def command(name: str) -> str:
    """Summary, usage, examples, arguments and options of a command."""
    found = commands()[name]
    shown = [p for p in found.params if not getattr(p, "hidden", False) and p.name != "help"]
    arguments = [_metavar(p) for p in shown if not p.opts[0].startswith("-")]
    usage = " ".join(
        ["zofo", name, *(["[OPTIONS]"] if len(shown) > len(arguments) else []), *arguments]
    )
    summary, *rest = found.help.split("\n\n")
    examples = [part for part in rest if part.startswith("zofo ")]
    prose = [part for part in rest if part not in examples]
    code = "```\n" + "\n".join([usage, *([""] if examples else []), *examples]) + "\n```"
    rows = [_parameter(p) for p in shown]
    table = _table(("argument or option", "default", "what"), rows) if rows else ""
    return "\n\n".join(part for part in (summary, *prose, code, table) if part)


def _metavar(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required or argument.metavar else f"[{name}]"


def _parameter(parameter: Any) -> tuple[str, str, str]:
    names = [*parameter.opts, *parameter.secondary_opts]
    if not names[0].startswith("-"):
        names = [_metavar(parameter)]
    elif parameter.metavar:
        names[-1] += f" {parameter.metavar}"
    default = "required" if parameter.required else _code(parameter.default)
    is_switch = getattr(parameter, "is_flag", False) and parameter.default is False
    return ", ".join(_code(n) for n in names), "" if is_switch else default, parameter.help or ""


def _type(schema: dict[str, Any]) -> str:
    """The type of a JSON schema in words: `number > 0 or auto`."""
    for union in ("anyOf", "oneOf"):
        if union in schema:
            parts = [_type(s) for s in schema[union] if s.get("type") != "null"]
            return " or ".join(dict.fromkeys(parts))
    if "enum" in schema or "const" in schema:
        return ", ".join(_code(v) for v in schema.get("enum", [schema.get("const")]))
    if "$ref" in schema:
        return "section"
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema['items'])}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"map to {_type(inner)}" if isinstance(inner, dict) else "section"
    names = {"string": "text", "boolean": "`true`, `false`"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    limits = [text.replace("4.29497e+09", "2³²") for text in limits]
    return " ".join([names.get(kind, kind), " and ".join(limits)]).strip()


def _of_schema(model: Any, prefix: str = "", schema: dict[str, Any] | None = None) -> str:
    properties = (schema or model.model_json_schema())["properties"]
    rows = [
        (f"`{prefix}{key}`", _type(entry), _code(entry.get("default")), entry["description"])
        for key, entry in properties.items()
        if key not in SECTIONS or "$ref" not in entry
    ]
    return _table(("key", "type", "default", "what"), rows)


def options(section: str) -> str:
    """The options of a section: run, model, adapter, task, study, rates, smoothness, trainer."""
    if section in SECTIONS:
        field = RunConfig.model_fields[section]
        return _of_schema(field.annotation, SECTIONS[section])
    if section == "trainer":
        fields = dataclasses.fields(zofo.HybridOptions)
        rows = [(_code(f.name), _code(f.default), f.metadata["help"]) for f in fields]
        return _table(("option", "default", "what"), rows)
    models = {"run": RunConfig, "study": StudySpec, "smoothness": SmoothnessOptions}
    return _of_schema(models[section], "smoothness." if section == "smoothness" else "")


def columns(table: str) -> str:
    """The columns of the tables of runs, curves and rewards."""
    known = {"runs": COLUMNS, "curves": CURVE_COLUMNS, "rewards": REWARD_COLUMNS}[table]
    return _table(("column", "what"), [(f"`{key}`", text) for key, text in known.items()])


def fill(markdown: str) -> str:
    """The page with every marker replaced."""
    kinds = {"command": command, "options": options, "columns": columns}
    return MARKER.sub(lambda m: kinds[m[1]](m[2]), markdown)


def missing() -> list[str]:
    """What the reference ought to show and does not: commands, sections and public names."""
    pages = {p.stem: p.read_text() for p in (ROOT / "docs" / "reference").glob("*.md")}
    found = {f"{m[1]} {m[2]}" for m in MARKER.finditer("\n".join(pages.values()))}
    wanted = {f"command {name}" for name in commands()}
    wanted |= {f"options {s}" for s in (*SECTIONS, "run", "study", "smoothness", "trainer")}
    problems = sorted(wanted - found)
    examples = api_examples(pages["api"])
    for name in zofo.__all__:
        if f"::: zofo.{name}\n" not in pages["api"]:
            problems.append(f"zofo.{name}")
        elif name not in examples:
            problems.append(f"an example of zofo.{name}")
        thing = getattr(zofo, name)
        if callable(thing) and not inspect.getdoc(thing):
            problems.append(f"a docstring of zofo.{name}")
    return problems


def api_examples(page: str) -> dict[str, str]:
    """The Python code in each section of a page, by the section's heading."""
    sections = re.split(r"^### ", page, flags=re.MULTILINE)
    blocks = {s.partition("\n")[0].strip("` "): _python(s) for s in sections[1:]}
    return {name: code for name, code in blocks.items() if code}


def _python(text: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside docs/ that pages link to, and fail if the reference is incomplete."""
    if problems := missing():
        raise PluginError(f"docs/reference does not show {', '.join(problems)}")
    for path in sorted({p for pattern in COPIED for p in ROOT.glob(pattern)}):
        name = path.relative_to(ROOT).as_posix()
        if name != "README.md":
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the markers, and lead links out of docs/ to the copies that `on_files` made."""
    source = page.file.src_uri
    if not (ROOT / "docs" / source).exists():
        return re.sub(r"\]\(docs/", "](", markdown)
    out = "../" * (source.count("/") + 1)
    markdown = markdown.replace(f"]({out}", f"]({out[3:]}")
    return fill(_with_space_before_lists(markdown))


def _with_space_before_lists(markdown: str) -> str:
    """GitHub starts a list below a line of text, Python-Markdown only below an empty line."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    start = re.compile(r"^((?![-*] |\d+\. |\s|#)\S.*)\n(?=[-*] |1\. )", re.MULTILINE)
    return "".join(p if p.startswith("```") else start.sub(r"\1\n\n", p) for p in parts)
