"""The README runs: its snippets train, its commands and links exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    "pip install -e '.[experiments]' && python experiments/train.py "
    "--config=experiments/digits_st3.py",
    "pip install -e '.[test]' && pytest",
]


def test_there_is_a_quick_start_for_linen_and_for_nnx():
    assert any("flax.linen" in snippet for snippet in SNIPPETS)
    assert any("st3jax.nnx" in snippet for snippet in SNIPPETS)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs_on_its_own(snippet):
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


def test_the_two_commands_are_there():
    for command in COMMANDS:
        assert command in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_scripts_lead_to_files(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"python\s(experiments/[\w/]+\.py)", text):
        assert (ROOT / target).exists(), target
