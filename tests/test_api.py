"""The house rules of the public names: documented, runnable, keyword-only options."""

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import st3jax
import st3jax.nnx

PACKAGE = pathlib.Path(st3jax.__file__).parent
MODULES = (st3jax.ops, st3jax.scores, st3jax.selection, st3jax.nnx)
PUBLIC = {name: getattr(st3jax, name) for name in st3jax.__all__} | {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
}
FUNCTIONS = {name: fn for name, fn in PUBLIC.items() if inspect.isfunction(fn)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_says_what_goes_in_and_out_and_shows_it(name):
    text = inspect.getdoc(FUNCTIONS[name])
    assert ">>>" in text
    for section in ("Args:", "Returns:", "Example:"):
        assert section in text
    for parameter in inspect.signature(FUNCTIONS[name]).parameters:
        assert f"{parameter}:" in text


@pytest.mark.parametrize("name", CLASSES)
def test_a_public_class_describes_its_fields(name):
    text = inspect.getdoc(CLASSES[name])
    for field in getattr(CLASSES[name], "_fields", ()):
        assert f"{field}:" in text


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_of_a_public_function_are_keyword_only(name):
    positional = [
        parameter
        for parameter in inspect.signature(FUNCTIONS[name]).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and parameter.default is not parameter.empty
    ]
    assert [parameter.name for parameter in positional] in (
        [],
        ["power"],
        ["criterion"],
        ["opt_state"],
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_file_starts_with_its_one_idea(path):
    assert path.name == "py.typed" or ast.get_docstring(ast.parse(path.read_text()))


def test_the_library_imports_no_data_no_checkpoints_and_no_tensorflow():
    heavy = ("tensorflow", "tensorflow_datasets", "grain", "orbax.checkpoint")
    code = f"import sys, st3jax; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_64_bit_mode_is_asked_for_in_one_place():
    asking = [
        path.relative_to(PACKAGE).as_posix()
        for path in SOURCES
        if "x64" in path.read_text()
    ]
    assert asking == ["selection/wide.py"]


def test_all_lists_are_sorted():
    for module in (st3jax, *MODULES):
        assert sorted(module.__all__) == sorted(set(module.__all__))
