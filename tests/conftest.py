"""The fixtures that all tests share."""

from __future__ import annotations

import copy
import functools
import gc
import os
import sys

import jinja2
import pytest
import torch

# Importing makes no garbage to speak of, so the modules of the tests are imported without searches
# for it.
gc.disable()


@pytest.fixture(autouse=True)
def _known_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _seeding_formats_no_stack():
    """Seed as `zofo.optim.generators.seed_generators` does wherever a test or a library seeds."""
    if torch.accelerator.is_available():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.manual_seed", torch.default_generator.manual_seed)
        yield


@pytest.fixture(scope="session", autouse=True)
def _files_need_not_reach_the_disk():
    """Make `os.fsync` do nothing. No test cuts the power, so no test has to wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _workers_share_the_compilation():
    """In a fresh clone, each of pytest-xdist's workers compiles the kernels of some dtypes.

    They find the others in the cache on disk. Without this, every worker compiles all of them.
    """
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        from zofo.noise.combine import combine

        dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
        count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        for dtype in dtypes[int(worker.removeprefix("gw")) :: count]:
            combine(torch.zeros(1, dtype=dtype), (1.0,), seed=0, step=0, tensor=0)


@pytest.fixture(scope="session", autouse=True)
def _templates_are_compiled_once():
    """Cache compiled jinja2 templates.

    peft compiles the template of its model card at every save.
    """
    with pytest.MonkeyPatch.context() as patch:
        compiled = functools.lru_cache(jinja2.Environment.compile)
        patch.setattr(jinja2.Environment, "compile", compiled)
        yield


@pytest.fixture(scope="module", autouse=True)
def _garbage_is_collected_once_a_module():
    """Collect garbage once per module.

    `Trainer.train` collects twice, and each collection visits every object that torch imported.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    if memory := sys.modules.get("accelerate.utils.memory"):
        memory.clear_device_cache = lambda garbage_collection=False: None


@pytest.fixture
def own_working_folder(tmp_path, monkeypatch):
    """Run the test in its own folder, so that files it creates by accident are found there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def clone():
    return copy.deepcopy


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory):
    from tests.support.hub_folders import save_decoder

    return str(save_decoder(tmp_path_factory.mktemp("decoder")))


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    from tests.support.hub_folders import save_encoder

    return str(save_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="session")
def encoder_decoder_folder(tmp_path_factory):
    from tests.support.hub_folders import save_encoder_decoder

    return str(save_encoder_decoder(tmp_path_factory.mktemp("encoder-decoder")))
