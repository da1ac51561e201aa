"""Fixtures for all tests."""

from __future__ import annotations

import copy
import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def _known_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _imported_objects_are_frozen():
    """`Trainer.train` collects garbage twice; without this, each time visits all of torch."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def own_working_folder(tmp_path, monkeypatch):
    """The test runs in its own folder, where whatever it makes by accident is found."""
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
