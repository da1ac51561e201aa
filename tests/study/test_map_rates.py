"""A study whose base has a map of learning rates in its grid, from the search to the report."""

from tests.support.tiny_study import complete, results, write_rows, write_study
from zofo.results.comparison import compare
from zofo.results.table import read_runs


def test_a_study_of_maps_runs_and_is_reported(tmp_path, decoder_folder):
    rates = {"*q_proj*": 1e-3, "*mlp*": 1e-4}
    path = write_study(
        tmp_path,
        decoder_folder,
        write_rows(tmp_path),
        rates=[{"base_lr": [1e-4, rates], "adapter_lr": [1e-3]}],
        seeds=[0],
    )
    complete(path)
    found = [entry["rates"]["base_lr"] for entry in results(tmp_path)["runs"]]
    assert rates in found
    assert 1e-4 in found
    comparison = compare(read_runs([tmp_path / "study"]))
    assert len(comparison.pairs) == 1
    complete(tmp_path / "study")  # nothing is left to do, and nothing is refused
