"""The documentation runs: its snippets train, its commands and links exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
README = (ROOT / "README.md").read_text()
SNIPPETS = [
    pytest.param(snippet, id=f"{page.name} {number}")
    for page in sorted(PAGES)
    for number, snippet in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), 1
    )
]
COMMANDS = [
    "pip install -e '.[experiments]' && python experiments/train.py "
    "--config=experiments/digits_st3.py",
    "pip install -e '.[test]' && pytest",
]


def test_there_is_a_quick_start_for_linen_and_for_nnx():
    assert "import flax.linen as nn" in README
    assert "st3jax.nnx.sparsify" in README


def test_the_readme_is_short_and_the_pages_have_snippets_too():
    assert len(README.splitlines()) <= 220
    ids = [snippet.id for snippet in SNIPPETS]
    assert {"options.md 1", "methods.md 1", "CONTRIBUTING.md 1"} <= set(ids)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_runs_on_its_own(snippet):
    exec(compile(snippet, "snippet", "exec"), {"__name__": "snippet"})


def headings(page):
    """The places on a page that a link can lead to."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


def test_the_two_commands_are_there():
    for command in COMMANDS:
        assert command in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_scripts_lead_to_files(page):
    text = page.read_text()
    for target, place in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        other = page.parent / target if target else page
        assert other.exists(), target
        assert not place or place in headings(other), f"{target}#{place}"
    for target in re.findall(r"python\s(experiments/[\w/]+\.py)", text):
        assert (ROOT / target).exists(), target
