"""The structure is the one that CONTRIBUTING.md shows: data goes one way."""

import pathlib
import re

import pytest

import st3jax
from benchmarks.module_graph import graph

LIBRARY = pathlib.Path(st3jax.__file__).parent
ROOT = LIBRARY.parent
IMPORTS = {
    name: [other for other in imported if not other.endswith("__init__.py")]
    for name, imported in graph(LIBRARY, "st3jax").items()
    if not name.endswith("__init__.py")
}


def rows():
    """The files of each row of the library's table, folders written out."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.split("| file | what lives there |")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        named = re.findall(r"`([^`]+)`", line.split("|")[1])
        yield [
            file
            for name in named
            for file in ([f for f in IMPORTS if f.startswith(name)] or [name])
        ]


ROWS = list(rows())
PLACE = {file: i for i, row in enumerate(ROWS) for file in row}


def test_every_file_of_the_library_has_its_place_in_the_table():
    listed = sorted(file for row in ROWS for file in row)
    assert listed == sorted(IMPORTS)


@pytest.mark.parametrize("file", IMPORTS)
def test_a_file_imports_only_what_lies_above_it(file):
    below = [
        other
        for other in IMPORTS[file]
        if PLACE[other] > PLACE[file]
        or (PLACE[other] == PLACE[file] and not same_room(file, other))
    ]
    assert below == []


def same_room(file, other):
    """Whether both are of a folder of their own among the methods."""
    folders = [name.rpartition("/")[0] for name in (file, other)]
    return folders[0] == folders[1] != "methods" and "/" in folders[0]


def test_methods_know_nothing_of_each_other_and_ops_nothing_of_optax():
    methods = [file for file in IMPORTS if file.startswith("methods/")]
    assert len(methods) > 8
    for file in methods:
        others = [other for other in IMPORTS[file] if other.startswith("methods/")]
        assert all(same_room(file, other) for other in others), file
    assert "optax" not in (LIBRARY / "ops.py").read_text()
    for path in (LIBRARY / "selection").glob("*.py"):
        assert "optax" not in path.read_text(), path


def test_the_library_does_not_know_the_experiments():
    names = {
        name.split("/")[0].removesuffix(".py") for name in graph(ROOT / "experiments")
    }
    for name in names - {"__init__"}:
        for path in LIBRARY.rglob("*.py"):
            pattern = rf"^\s*(import|from) {re.escape(name)}\b"
            assert not re.search(pattern, path.read_text(), re.M), (path, name)


def test_one_file_alone_enters_64_bit_mode():
    using = [
        path.relative_to(LIBRARY).as_posix()
        for path in LIBRARY.rglob("*.py")
        if "enable_x64" in path.read_text()
    ]
    assert using == ["selection/wide.py"]


def test_a_training_job_uses_what_the_library_exports():
    """Benchmarks may look inside: they measure the parts."""
    folder = ROOT / "experiments"
    for path in set(folder.rglob("*.py")) - set(folder.glob("benchmarks/*")):
        text = path.read_text()
        assert not re.search(r"^\s*from st3jax\b|^\s*import st3jax\.", text, re.M), path
        used = set(re.findall(r"\bst3jax\.(\w+)\b(?!/)", text)) - {"py"}
        assert used <= set(st3jax.__all__), path
