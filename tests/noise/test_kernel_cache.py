"""Where compiled kernels are kept if the usual folders cannot be written."""

from __future__ import annotations

import os
import stat
import warnings

import numba
import pytest
from numba.core import caching

from tests.support.forks import in_forks
from zofo.noise import kernel_cache


def deny(monkeypatch, denied):
    """As numba sees it: folders that cannot be written."""
    usual = caching._CacheLocator.ensure_cache_path

    def ensure(self):
        if denied(str(self.get_cache_path())):
            raise PermissionError(13, "Permission denied")
        usual(self)

    monkeypatch.setattr(caching._CacheLocator, "ensure_cache_path", ensure)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(kernel_cache, "can_cache", kernel_cache.can_cache.__wrapped__)


def test_the_usual_place_needs_no_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_cache.can_cache.__wrapped__()


def test_the_temporary_directory_comes_next(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    deny(monkeypatch, lambda path: not path.startswith(str(tmp_path)))
    with pytest.warns(UserWarning, match=r"zofo-numba-\d+; set NUMBA_CACHE_DIR"):
        assert kernel_cache.can_cache()
    (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith("zofo-numba-"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert str(folder) == numba.config.CACHE_DIR


@pytest.mark.parametrize("case", ["nothing", "others may write", "a link", "a file"])
def test_without_a_private_folder_nothing_is_kept(monkeypatch, tmp_path, case):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = tmp_path / f"zofo-numba-{os.getuid()}"
    if case == "others may write":
        place.mkdir()
        place.chmod(0o777)
    elif case == "a link":
        (tmp_path / "real").mkdir()
        place.symlink_to("real")
    elif case == "a file":
        place.touch()
    denied = (lambda _: True) if case == "nothing" else (lambda p: not p.startswith(str(tmp_path)))
    deny(monkeypatch, denied)
    with pytest.warns(UserWarning, match="only until this process ends"):
        assert not kernel_cache.can_cache()


def as_nobody():
    from zofo.noise.kernel_cache import can_cache

    os.environ["HOME"] = "/nonexistent"
    numba.config.CACHE_DIR = ""
    os.setuid(65534)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return can_cache.__wrapped__(), [str(w.message) for w in said]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_user_who_may_write_neither_package_nor_home():
    (found,) = in_forks((as_nobody,))
    assert len(found[1]) == 1
    assert "numba keeps compiled kernels" in found[1][0]
