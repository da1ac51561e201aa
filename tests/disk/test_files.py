"""A target that cannot be written is reported before any work starts."""

import pytest

from zofo.disk.files import problem_of_target


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_new_target_is_fine_and_nothing_is_left(tmp_path, is_folder):
    assert problem_of_target(tmp_path / "a" / "b", is_folder=is_folder) is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    assert problem_of_target(tmp_path / "file") is None
    assert problem_of_target(tmp_path, is_folder=True) is None
    assert "is a folder" in problem_of_target(tmp_path)
    assert "name a folder" in problem_of_target(tmp_path / "file", is_folder=True)
    for is_folder in (False, True):
        found = problem_of_target(tmp_path / "file" / "x" / "y", is_folder=is_folder)
        assert f"{tmp_path / 'file'} is a file" in found
    assert (tmp_path / "file").read_text() == "x"


def test_a_name_that_no_file_can_have(tmp_path):
    assert "choose another" in problem_of_target(tmp_path / ("x" * 5000) / "y")
