"""Whatever a field is set to, a run starts or says in one sentence why it does not."""

import importlib
import math
import os
import pathlib
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

import base_config
import digits_st3
import train
from errors import UserError
from fields import (
    checked,
    choice,
    flag,
    number,
    numbers_of,
    pairs,
    text,
    texts,
    whole,
    wholes,
)
from job.build import Job
from job.methods import METHODS
from job.settings import KINDS, settle

BENCHMARKS = pathlib.Path(base_config.__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # the folder is no package
odd = importlib.import_module("odd_values")

LIMIT = 60  # seconds, for what would never end
SLOW = {("model.depth", 1500)}  # a deep network takes its time, and starts
COMMON = base_config.get_config().defaults.common


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Where the data set is prepared."""
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(autouse=True)
def elsewhere(data_dir, tmp_path, monkeypatch):
    """Odd folders of data are made where they are in nobody's way."""
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def context(field):
    """What makes a field of use."""
    section = field.partition(".")[0]
    return odd.CONTEXTS.get(section, {}) | odd.CONTEXTS.get(field, {})


@pytest.mark.parametrize("field", KINDS)
def test_an_odd_value_starts_or_is_told(field):
    values = odd.odd_values(field)
    assert len(values) > 12
    told = []
    for value in values:
        if isinstance(value, int) and (field, value) in SLOW:
            continue
        with odd.limited(LIMIT):
            config = odd.changed(context(field), [odd.Change(field, value)])
            result = odd.job_or_sentence(config)
        if isinstance(result, str):
            assert "does nothing" not in result
            told.append(result)
        else:
            assert isinstance(result, Job)
    assert told
    section, _, name = field.rpartition(".")
    name = name.removesuffix("_steps")  # as st3jax calls it
    names = (name, f"config.{section}: ", "config.batch_size ")  # of so few images
    unnamed = [x for x in told if not any(name in x for name in names)]
    assert unnamed == []


@pytest.mark.parametrize("field", [x for x in KINDS if odd.is_in(COMMON, x)])
def test_an_odd_default_is_settled_or_told(field):
    told = set()
    for value in odd.ODD:
        change = odd.Change(field, value, "defaults.common.")
        try:
            settle(odd.changed(context(field), [change]))
        except UserError as error:
            told.add(str(error))
    assert any(sentence.startswith(f"config.{field} ") for sentence in told)
    assert not any("\n" in sentence for sentence in told)


def test_choices_are_those_that_there_are():
    assert set(KINDS["sparsity.method"].choices) == set(METHODS)
    assert KINDS["data.name"].default == KINDS["model.name"].default == ""


KIND = [  # field, value, the sentence
    (whole(at_least=1, at_most=9), 10, "is 9 or less, got 10: it is from 1 to 9"),
    (
        whole(at_least=1, below=9),
        1.0,
        "is a whole number, got 1.0: it is 1 or more",
    ),
    (whole(at_least=1), True, "is a whole number, got True: it is 1 or more"),
    (whole(at_least=1), 0, "is 1 or more, got 0"),
    (number(above=0, at_most=1), 10**400, "is below inf, got 1000"),
    (
        number(above=0, at_most=1),
        math.nan,
        "is above 0, got nan: it is above 0 and 1",
    ),
    (number(), "a", "is a number, got 'a'"),
    (flag(), 1, "is True or False, got 1"),
    (flag(), None, "is True or False, got None"),
    (choice(None, "a", "b"), "c", "is one of 'a', 'b', got 'c'"),
    (text(), "a\0b", "is a text, up to 1,000 printable characters, got 'a\\x00b'"),
    (text(), b"a", "is a text, up to 1,000 printable characters, got b'a'"),
    (text(), "x" * 2000, "(2,002 long)"),
    (texts(), "abc", "is made of texts, got 'abc'"),
    (numbers_of(above=0), (1, 0), "is above 0, got (1, 0)"),
    (numbers_of(above=0), (1, math.inf), "is made of numbers, got (1, inf): each is"),
    (wholes("above 0"), (1.5,), "are whole numbers above 0, got (1.5,)"),
    (pairs("this"), (1, 2), "are pairs of this, got (1, 2)"),
    (pairs("this", at_most=1), (("a", 2),), "are pairs of this, got (('a', 2),)"),
    (pairs("this"), (("a", "b"),), "are pairs of this, got (('a', 'b'),)"),
    (whole(), np.array([[1], [2]]), "got array([[1], [2]])"),
    (
        numbers_of(),
        (10**5000,),
        "is made of numbers, got a value of type tuple ",
    ),
]


@pytest.mark.parametrize(("field", "value", "sentence"), KIND)
def test_a_sentence_has_the_name_the_value_and_what_it_may_be(field, value, sentence):
    with pytest.raises(UserError) as error:
        checked("x.y", field, value)
    assert str(error.value).startswith("config.x.y ")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


PLAIN = [  # field, value, what becomes of it
    (whole(), np.int64(3), 3),
    (number(), 3, 3.0),
    (number(above=0), np.float32(0.5), 0.5),
    (flag(), np.bool_(True), True),
    (numbers_of(), [np.float64(0.5), 1], (0.5, 1.0)),
    (pairs("this"), [["*", 1]], (("*", 1.0),)),
]


@pytest.mark.parametrize(("field", "value", "plain"), PLAIN)
def test_values_are_those_of_plain_python(field, value, plain):
    became = checked("x", field, value)
    assert became == plain
    assert repr(became) == repr(plain)


SECTIONS = [  # field, value, the sentence
    ("data", 3, "config.data has fields and their values, got 3"),
    ("seed", {"a": 1}, "config.seed is a whole number, got {'a': 1}"),
    ("defaults", 3, "config.defaults has fields and their values, got 3"),
    ("defaults.common", 3, "config.defaults.common has fields and their values, got 3"),
    ("defaults.common.data", (), "config.defaults.common.data has fields and their"),
    ("defaults.lrr.fine_tune_epochs", "x", "config.fine_tune_epochs is a whole number"),
    ("defaults.granet.ramp", ("a", 1), "granet.ramp is two shares of num_epochs, (be"),
    ("defaults.granet.ramp", (0, math.nan), "granet.ramp is two shares of num_epochs,"),
    ("lrr.keep", 0.999999999, "the run has 1,000,000 epochs or less, got 92,103,406,"),
    (
        "data.test_split",
        "train",
        "config.data.test_split 'train' is what config.data.",
    ),
    (
        "data.test_split",
        "all",
        "test_split 'all' has images of config.data.train_",
    ),
    ("data.test_split", "train[:9]", "'train[:9]' has images of config.data.train_spl"),
    ("data.shift_pixels", 9, "shift_pixels is 8 or less, as config.data.image_size is"),
]


@pytest.mark.parametrize(("field", "value", "sentence"), SECTIONS)
def test_what_is_wrong_with_more_than_a_field_is_told(field, value, sentence):
    fields = context(field) | context(field.removeprefix("defaults."))
    result = odd.job_or_sentence(odd.changed(fields, [odd.Change(field, value)]))
    assert sentence in result


def test_more_pixels_than_memory_holds_are_refused(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 400)  # 160,000 bytes
    config = odd.changed({}, [odd.Change("data.in_memory", True)])
    assert isinstance(odd.job_or_sentence(config), Job)  # 115,008 of them
    config.data.image_size = 16
    sentence = odd.job_or_sentence(config)
    assert sentence.startswith("config.data.in_memory keeps 0.0 GB of pixels, and th")
    assert sentence.endswith("config.data.image_size smaller, which is 16")


def test_folders_that_are_no_splits_are_told(tmp_path):
    for name in ("train", "test"):
        (tmp_path / "data" / name / "a").mkdir(parents=True)
    folder = {"data.name": "folder", "data.dir": str(tmp_path / "data")}
    for split in ("..", "/", ".", "", "test/..", "../data/train"):
        config = odd.changed(folder, [odd.Change("data.train_split", split)])
        said = "config.data.train_split is the name of a folder in config.data.dir, go"
        assert said in odd.job_or_sentence(config)
    config = odd.changed(folder, [odd.Change("data.train_split", "./test/")])
    assert "has images of config.data.train_split './test/'" in odd.job_or_sentence(
        config
    )


COMMANDS = [  # arguments, the sentence
    ("--config.seed=abc", "'abc': config.seed is a whole number, 0 or more and below"),
    ("--config.defaults.common.fine_tune_epochs=x", "config.fine_tune_epochs is a wh"),
    ("--config.data.nam=3", "has no field 'nam', did you mean 'name': experiments/ba"),
    ("--config.seed.x=3", "error: the configuration has no field 'x': experiments/bas"),
    ("--config.=3", "error: the configuration has no field '': experiments/base_con"),
    ("--config.data.mean[7]=3", "has no field 'mean[7]', did you mean 'mean': exper"),
]


@pytest.fixture
def read(monkeypatch):
    """Reads a command line as ``train.py`` does, and gives the line that it ends in."""

    def ending(*command):
        values = flags.FlagValues()
        command = ["train.py", *command]
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
        monkeypatch.setattr(train.flags, "FLAGS", values)
        with pytest.raises(SystemExit) as ended:
            train.parse_flags(command)
        assert "\n" not in ended.value.code
        return ended.value.code

    return ending


@pytest.mark.parametrize(("argument", "sentence"), COMMANDS)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_flag_that_cannot_be_read_is_told_in_a_line(argument, sentence, read):
    assert sentence in read(f"--config={digits_st3.__file__}", argument)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_file_that_is_no_configuration_is_told(read, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config(:")
    said = "error: the configuration cannot be read (SyntaxError: invalid syntax"
    assert read(f"--config={path}").startswith(said)
