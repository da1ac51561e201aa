"""The lists of packages agree with each other."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def pins(name: str) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([\w.+!]+)", (ROOT / name).read_text(), re.MULTILINE)
    return {canonicalize_name(package): version for package, version in found}


def test_every_package_but_torch_has_its_digests():
    text = (ROOT / "constraints-hashes.txt").read_text()
    embedded = re.search(r"^EMBEDDED := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert embedded is not None
    expected = pins("constraints.txt")
    for pin in embedded[1].split():
        name, _, version = pin.partition("==")
        expected[canonicalize_name(name)] = version
    del expected["torch"]
    assert pins("constraints-hashes.txt") == expected, "run make hashes"
    for block in re.split(r"\n(?=\w)", text):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", block), block


def test_exact_versions_lie_in_the_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    exact = pins("constraints-flower.txt") | pins("constraints.txt")
    wanted = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in map(Requirement, itertools.chain(*wanted)):
        name = canonicalize_name(requirement.name)
        if name != "zofo":
            assert requirement.specifier.contains(exact[name], prereleases=True), requirement
    (jinja,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "jinja2")
    assert not jinja.specifier.contains(Version("3.1.5"))
