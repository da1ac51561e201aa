"""An anchor that cannot work is refused when the configuration is read."""

from __future__ import annotations

import pytest

from tests.support.damage import refused
from zofo.config.load import load_config
from zofo.run.prepare import check_processes


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["base_anchor=-1"], "base_anchor"),
        (["base_anchor=inf"], "base_anchor"),
        (["base_anchor=2000", "base_lr=1e-3"], "at most 1000"),
        (["base_anchor=2000", "base_lr={'*': 1e-3}"], "at most 1000"),
        (["base_anchor=1", "method=fo-ft"], "by its gradient"),
        (["base_anchor=1", "model.quantization=nf4"], "scales"),
    ],
)
def test_an_anchor_that_cannot_work_is_refused(overrides, words):
    refused(lambda: load_config(overrides=overrides), words)


def test_an_anchor_needs_one_process():
    config = load_config(overrides=["base_anchor=1", "base_lr=1e-3"])
    check_processes(config, 1)
    refused(lambda: check_processes(config, 2), "one process")
