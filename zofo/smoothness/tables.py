"""Tables of smoothness, for the page, the report and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zofo.disk.files import read_json
from zofo.errors import UserError
from zofo.pages.tables import Cell, Column, Columns, Table, make_table, text_cell
from zofo.smoothness.summary import FILE, VERSION

_MARKS = {"confirmed": "win", "refuted": "loss"}
_NOTHING = Cell("–", None)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary in a run folder; None if there is none of this version."""
    try:
        found = read_json(folder / FILE)
    except UserError:
        return None
    is_ours = isinstance(found, dict) and found.get("version") == VERSION
    return found if is_ours and isinstance(found.get("path"), list) else None


def constants_table(summary: Mapping[str, Any]) -> Table:
    """Ends of the spectrum, trace, ranks and curvature by forward passes, per block and step."""
    spectra = {(r["block"], r["step"]): r for r in summary["spectra"]}
    forwards = {(r["block"], r["step"]): r for r in summary["directional"]}

    def end(field: str) -> Any:
        def cell(key: Any) -> Cell:
            if key not in spectra:
                return _NOTHING
            found = spectra[key][field]
            text, aside = f"{found['value']:.4g}", f"± {found['residual']:.1g}"
            return Cell(text, found["value"], aside)

        return cell

    def estimate(field: str, records: Mapping[Any, Any] = spectra) -> Any:
        return lambda key: _interval(records.get(key, {}).get(field), "mean")

    columns: Columns = {
        Column("block", "block", False): lambda key: text_cell(str(key[0])),
        Column("step", "steps"): lambda key: _number(key[1], ".0f"),
        Column("num_parameters", "numbers"): lambda key: _number(
            (spectra.get(key) or forwards[key])["num_parameters"], ",.0f"
        ),
        Column("top", "largest eigenvalue ± residual"): end("top"),
        Column("bottom", "smallest"): end("bottom"),
        Column("trace", "trace [95%]"): estimate("trace"),
        Column("effective_rank", "effective rank tr/‖H‖ [95%]"): estimate("effective_rank"),
        Column("stable_rank", "‖H‖²_F/‖H‖² [95%]"): estimate("stable_rank"),
        Column("forward_trace", "trace by forwards [95%]"): estimate("trace", forwards),
        Column("rounding", "its rounding"): lambda key: _number(
            forwards.get(key, {}).get("rounding"), ".2g"
        ),
    }
    return make_table(columns, dict.fromkeys((*spectra, *forwards)))


_OF_FIT: Columns = {
    Column("block", "block", False): lambda fit: text_cell(fit["block"]),
    Column("kind", "constant", False): lambda fit: text_cell(fit["kind"]),
    Column("points", "points"): lambda fit: _number(fit["linear"]["num_points"], ".0f"),
    Column("level", "level [95%]"): lambda fit: _interval(fit["level"]),
    Column("l0", "L0 [95%]"): lambda fit: _interval(fit["linear"]["constant"]),
    Column("l1", "L1 [95%]"): lambda fit: _interval(fit["linear"]["slope"]),
    Column("exponent", "exponent p [95%]"): lambda fit: _interval(fit["power"]["exponent"]),
    Column("grows", "grows", False): lambda fit: _verdict(fit["grows"], is_short=True),
    Column("subquadratic", "p < 2", False): lambda fit: _verdict(
        fit["is_subquadratic"], is_short=True
    ),
}


def _fits_of(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"block": block, "kind": kind, **fit}
        for kind, blocks in summary["fits"].items()
        for block, fit in blocks.items()
    ]


def fits_table(summary: Mapping[str, Any]) -> Table:
    """Level, L0, L1, exponent and verdicts, with one row per block and kind of constant."""
    return make_table(_OF_FIT, _fits_of(summary))


def smoothness_table(
    summaries: Mapping[str, Mapping[str, Any]], links: Mapping[str, str]
) -> Table | None:
    """The fits of several runs; None if there are none.

    Args:
        summaries: run -> summary.
        links: run -> link to its folder, with a slash at the end.
    """
    fits = [{"run": run, **fit} for run, found in summaries.items() for fit in _fits_of(found)]
    columns: Columns = {
        Column("run", "run", False): lambda fit: Cell(
            fit["run"], fit["run"], href=f"{links[fit['run']]}smoothness.html"
        ),
        **_OF_FIT,
    }
    return make_table(columns, fits) if fits else None


def majoriser_table(summary: Mapping[str, Any]) -> Table:
    """Norms of the blocks, κ and the sampled quotients, with one row per step."""

    def kappa(record: Any) -> Cell:
        if record.get("kappa") is None:
            return _NOTHING
        return Cell(f"{record['kappa']:.3g} ± {record['residual']:.2g}", record["kappa"])

    columns: Columns = {
        Column("step", "steps"): lambda record: _number(record["step"], ".0f"),
        Column("base", "‖H_xx‖"): lambda record: _number(record["constants"].get("base"), ".3g"),
        Column("adapter", "‖H_yy‖"): lambda record: _number(
            record["constants"].get("adapter"), ".3g"
        ),
        Column("kappa", "κ ± residual"): kappa,
        Column("sampled", "largest sampled quotient"): lambda record: _number(
            max(record.get("sampled") or [None]),
            ".3g",  # no vectors if a block's Hessian is 0
        ),
        Column("verdict", "majorises", False): lambda record: _verdict(
            record.get("verdict", "undecided at this scale")
        ),
    }
    return make_table(columns, summary["majoriser"])


def claims_table(claims: Sequence[Mapping[str, str]]) -> Table:
    """The assumptions of the theory, and the verdict of this run."""
    columns: Columns = {
        Column("claim", "claim", False): lambda claim: text_cell(claim["claim"]),
        Column("verdict", "verdict", False): lambda claim: _verdict(claim["verdict"]),
        Column("why", "because", False): lambda claim: text_cell(claim["why"]),
    }
    return make_table(columns, claims)


def _number(value: float | None, form: str) -> Cell:
    return _NOTHING if value is None else Cell(f"{value:{form}}", float(value))


def _interval(found: Mapping[str, Any] | None, key: str = "value") -> Cell:
    if found is None or found[key] is None:
        return _NOTHING
    value, low, high = found[key], found["low"], found["high"]
    aside = "no interval" if low is None or high is None else f"[{low:.3g}, {high:.3g}]"
    if low == high == 0:  # a fit with L0 = 0 or L1 = 0 in every resample
        aside = "at its bound in every resample"
    return Cell(f"{value:.3g}", value, aside=aside)


def _verdict(text: str, *, is_short: bool = False) -> Cell:
    mark = _MARKS.get(text, "undecided")
    shown = text.partition(" ")[0] if is_short else text
    return Cell(shown, text, mark=f"outcome {mark}")
