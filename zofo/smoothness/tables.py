"""Tables of smoothness, for the page, the report and the terminal alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zofo.disk.files import read_json
from zofo.errors import UserError
from zofo.pages.tables import Cell, Column, Table
from zofo.smoothness.summary import FILE, VERSION

_MARKS = {"confirmed": "win", "refuted": "loss"}


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What `zofo smoothness` left in a run folder; None if missing or of another version."""
    try:
        found = read_json(folder / FILE)
    except UserError:
        return None
    is_ours = isinstance(found, dict) and found.get("version") == VERSION
    return found if is_ours and isinstance(found.get("path"), list) else None


def constants_table(summary: Mapping[str, Any]) -> Table:
    """A row a block and step: ends of the spectrum, trace, ranks, curvature by forwards."""
    columns = (
        Column("block", "block", False),
        Column("step", "steps"),
        Column("num_parameters", "numbers"),
        Column("top", "largest eigenvalue ± residual"),
        Column("bottom", "smallest"),
        Column("trace", "trace [95%]"),
        Column("effective_rank", "effective rank tr/‖H‖ [95%]"),
        Column("stable_rank", "‖H‖²_F/‖H‖² [95%]"),
        Column("forward_trace", "trace by forwards [95%]"),
        Column("rounding", "its rounding"),
    )
    spectra = {(r["block"], r["step"]): r for r in summary["spectra"]}
    forwards = {(r["block"], r["step"]): r for r in summary["directional"]}
    rows = []
    for key in dict.fromkeys((*spectra, *forwards)):
        record, own = spectra.get(key), forwards.get(key)
        known: Mapping[str, Any] = record or own or {}
        rows.append(
            (
                Cell(str(key[0]), str(key[0])),
                _number(key[1], ".0f"),
                _number(known["num_parameters"], ",.0f"),
                _end(None if record is None else record["top"]),
                _end(None if record is None else record["bottom"]),
                _estimate(None if record is None else record["trace"]),
                _estimate(None if record is None else record["effective_rank"]),
                _estimate(None if record is None else record["stable_rank"]),
                _estimate(None if own is None else own["trace"]),
                _number(None if own is None else own["rounding"], ".2g"),
            )
        )
    return Table(columns, tuple(rows), {})


def fits_table(summary: Mapping[str, Any], label: str = "", href: str = "") -> Table:
    """A row a block and kind of constant: level, L0, L1, exponent, verdicts."""
    return Table(_FIT_COLUMNS, tuple(_fit_rows(summary, label, href)), {})


def smoothness_table(
    summaries: Mapping[str, Mapping[str, Any]], links: Mapping[str, str]
) -> Table | None:
    """The fits of several runs; None where there is none.

    Args:
        summaries: run -> summary.
        links: run -> its folder, with a slash at the end.
    """
    rows = [
        row
        for run, summary in summaries.items()
        for row in _fit_rows(summary, run, f"{links[run]}smoothness.html")
    ]
    columns = (Column("run", "run", False), *_FIT_COLUMNS)
    return Table(columns, tuple(rows), {}) if rows else None


def majoriser_table(summary: Mapping[str, Any]) -> Table:
    """A row a step: the blocks' norms, κ, the sampled quotients."""
    columns = (
        Column("step", "steps"),
        Column("base", "‖H_xx‖"),
        Column("adapter", "‖H_yy‖"),
        Column("kappa", "κ ± residual"),
        Column("sampled", "largest sampled quotient"),
        Column("verdict", "majorises", False),
    )
    rows = []
    for record in summary["majoriser"]:
        known = record.get("kappa") is not None
        rows.append(
            (
                _number(record["step"], ".0f"),
                _number(record["constants"].get("base"), ".3g"),
                _number(record["constants"].get("adapter"), ".3g"),
                Cell(f"{record['kappa']:.3g} ± {record['residual']:.2g}", record["kappa"])
                if known
                else Cell("–", None),
                _number(max(record["sampled"]) if known else None, ".3g"),
                _verdict(record["verdict"] if known else "undecided at this scale"),
            )
        )
    return Table(columns, tuple(rows), {})


def claims_table(claims: Sequence[Mapping[str, str]]) -> Table:
    """What the theory assumes, and what this run says of it."""
    columns = (
        Column("claim", "claim", False),
        Column("verdict", "verdict", False),
        Column("why", "because", False),
    )
    rows = tuple(
        (Cell(c["claim"], c["claim"]), _verdict(c["verdict"]), Cell(c["why"], c["why"]))
        for c in claims
    )
    return Table(columns, rows, {})


_FIT_COLUMNS = (
    Column("block", "block", False),
    Column("kind", "constant", False),
    Column("points", "points"),
    Column("level", "level [95%]"),
    Column("l0", "L0 [95%]"),
    Column("l1", "L1 [95%]"),
    Column("exponent", "exponent p [95%]"),
    Column("grows", "grows", False),
    Column("subquadratic", "p < 2", False),
)


def _fit_rows(summary: Mapping[str, Any], label: str, href: str) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    for kind, blocks in summary["fits"].items():
        for block, fit in blocks.items():
            first = (Cell(label, label, href=href),) if label else ()
            rows.append(
                (
                    *first,
                    Cell(block, block),
                    Cell(kind, kind),
                    _number(fit["linear"]["num_points"], ".0f"),
                    _quantity(fit["level"]),
                    _quantity(fit["linear"]["constant"]),
                    _quantity(fit["linear"]["slope"]),
                    _quantity(fit["power"]["exponent"]),
                    _verdict(fit["grows"], is_short=True),
                    _verdict(fit["is_subquadratic"], is_short=True),
                )
            )
    return rows


def _number(value: float | None, form: str) -> Cell:
    return Cell("–", None) if value is None else Cell(f"{value:{form}}", float(value))


def _end(end: Mapping[str, float] | None) -> Cell:
    if end is None:
        return Cell("–", None)
    return Cell(f"{end['value']:.4g}", end["value"], aside=f"± {end['residual']:.1g}")


def _estimate(found: Mapping[str, Any] | None) -> Cell:
    if found is None:
        return Cell("–", None)
    return _with_interval(found["mean"], found["low"], found["high"])


def _quantity(found: Mapping[str, Any]) -> Cell:
    return _with_interval(found["value"], found["low"], found["high"])


def _with_interval(value: float | None, low: float | None, high: float | None) -> Cell:
    if value is None:
        return Cell("–", None)
    aside = "no interval" if low is None or high is None else f"[{low:.3g}, {high:.3g}]"
    if low == high == 0:
        aside = "at its bound in every resample"
    return Cell(f"{value:.3g}", value, aside=aside)


def _verdict(text: str, *, is_short: bool = False) -> Cell:
    mark = _MARKS.get(text, "undecided")
    shown = text.partition(" ")[0] if is_short else text
    return Cell(shown, text, mark=f"outcome {mark}")
