"""The ranges of setup.cfg and the versions that are tested, which are to agree."""

import configparser
import os
import pathlib
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = pathlib.Path(__file__).parent.parent


def required():
    """Every direct requirement, also that of the tests, and its range."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"]
    lines += config["options.extras_require"]["test"]
    requirements = [Requirement(line) for line in lines.split("\n") if line]
    return {canonicalize_name(x.name): x.specifier for x in requirements}


def pinned(name):
    """From package to version, in a file of pins."""
    lines = (ROOT / ".ci" / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_ranges_have_a_lower_end_alone_and_it_is_tested():
    lowest = {}
    for name, specifiers in required().items():
        (specifier,) = specifiers
        assert specifier.operator == ">=", name
        lowest[name] = Version(specifier.version)
    oldest = pinned("oldest.txt")
    assert len(lowest) > 20
    assert {name: oldest.get(name) for name in lowest} == lowest


@pytest.mark.parametrize("name", ["oldest.txt", "pins.txt"])
def test_pins_are_of_every_requirement_and_within_its_range(name):
    pins = pinned(name)
    assert pins.keys() >= required().keys()
    for package, specifiers in required().items():
        assert pins[package] in specifiers
    assert pins["jax"] == pins["jaxlib"]


def test_a_script_beside_the_clone_imports_the_library(tmp_path):
    (tmp_path / "st3jax").mkdir()  # what a clone is called
    (tmp_path / "script.py").write_text("import st3jax; print(st3jax.__file__)")
    run = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert run.stdout.endswith("st3jax/__init__.py\n")  # not None, of a mere folder
