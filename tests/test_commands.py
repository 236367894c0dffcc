"""Every command that the documentation shows can be typed: its flags are there."""

import argparse
import importlib.util
import os
import pathlib
import re
import shlex
import sys
from unittest import mock

import pytest
from absl import flags
from training import parsed

import base_config
import digits_st3
import imagenet_st3
from job.settings import settle

EXPERIMENTS = pathlib.Path(base_config.__file__).parent
ROOT = EXPERIMENTS.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *EXPERIMENTS.rglob("*.py")]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in sorted(PAGES)}
COMMAND = r"python (experiments/\S+\.py)( .*)?"


def inline(text):
    """What stands between backticks, in one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`+([^`]+)`+", text)]


def commands():
    """Script and arguments of each command, once: inline, or on a line of its own."""
    found = {}
    for text in TEXTS.values():
        lines = [line.strip() for line in text.splitlines()]
        for line in [*inline(text), *lines]:
            if command := re.fullmatch(rf"(?:srun |.* && )?{COMMAND}", line):
                found[line] = command[1], tuple(shlex.split(command[2] or ""))
    return found


COMMANDS = commands()
OPTIONS = sorted(
    {
        span
        for text in TEXTS.values()
        for span in inline(text)
        if re.match(r"--config\.\S+=", span)
    }
)
OWN_OPTIONS = [  # of a benchmark, in its docstring
    (page, span)
    for page, text in TEXTS.items()
    for span in inline(text)
    if "/benchmarks/" in page and re.match(r"--\w\S*=", span)
]


class Parsed(Exception):  # noqa: N818  it is no mistake
    """An argument parser took the arguments."""


def own_flags():
    """The flags of scripts and configurations: not those that absl always has."""
    module_of = flags.FLAGS.find_module_defining_flag
    always = ("absl.app", "absl.logging")
    return [name for name in flags.FLAGS if module_of(name) not in always]


@pytest.fixture
def parse(monkeypatch):
    """Reads arguments as a script does that has just been started."""
    before = {name: flags.FLAGS[name] for name in own_flags()}
    for name in before:
        delattr(flags.FLAGS, name)

    def parse(script, arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.syspath_prepend(str((ROOT / script).parent))
        spec = importlib.util.spec_from_file_location("started", script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if "define_flags" in vars(module):  # if it is started alone
            module.define_flags()
        if "argparse" not in vars(module):
            assert flags.FLAGS(sys.argv) == [script]
            return
        take = argparse.ArgumentParser.parse_args

        def parse_args(*arguments):
            raise Parsed(take(*arguments))

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Parsed):
            module.main()

    with mock.patch.dict(os.environ):
        yield parse
    for name in own_flags():
        delattr(flags.FLAGS, name)
    for name, flag in before.items():
        flags.FLAGS[name] = flag


def test_commands_are_found():
    scripts = {script for script, _ in COMMANDS.values()}
    documented = {
        f"experiments/{name}.py"
        for name in ("train", "prepare", "benchmarks/compare_methods")
    }
    assert documented <= scripts
    assert len(COMMANDS) > 25
    assert "--config.model.dtype=bfloat16" in OPTIONS
    assert any(line.startswith("pip install") for line in COMMANDS)
    assert len(OWN_OPTIONS) > 3


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_command_can_be_typed(command, parse):
    script, arguments = COMMANDS[command]
    parse(script, arguments)
    if script == "experiments/train.py":
        settle(flags.FLAGS.config)


@pytest.mark.parametrize("options", OPTIONS)
def test_an_option_is_a_field_and_of_its_type(options):
    for module in (digits_st3, imagenet_st3):
        parsed(f"--config={module.__file__}", *shlex.split(options))


@pytest.mark.parametrize(("script", "options"), OWN_OPTIONS)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_an_option_of_a_benchmark_is_one(script, options, parse):
    parse(script, shlex.split(options))


def test_every_field_that_is_written_about_is_there():
    known = base_config.get_config()
    written = {
        (page, field)
        for page, text in TEXTS.items()
        for field in re.findall(r"--config\.([a-z_]{2,}(?:\.[a-z_]+)*)", text)
    }
    assert len(written) > 30
    for page, field in sorted(written):
        node = known
        for name in field.split("."):
            assert name in node, f"{page} has {field}"
            node = node[name]
