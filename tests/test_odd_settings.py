"""Whatever a field is set to, a run starts or says in one sentence why it does not."""

import importlib
import pathlib
import re
import sys

import numpy as np
import pytest

import base_config
import train
from errors import UserError
from fields import checked, number, text, whole
from job.build import Job
from job.methods import METHODS
from job.settings import KINDS
from models import MODELS
from training import parsed

BENCHMARKS = pathlib.Path(base_config.__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # the folder is no package
odd = importlib.import_module("odd_settings")

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
    values = odd.odd_values(KINDS[field])
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
    name = field.rpartition(".")[2].removesuffix("_steps")
    assert [sentence for sentence in told if name not in sentence] == []


@pytest.mark.parametrize("field", [x for x in KINDS if odd.is_in(COMMON, x)])
def test_an_odd_default_starts_or_is_told(field):
    for value in odd.ODD:
        with odd.limited(LIMIT):
            change = odd.Change(field, value, "defaults.common.")
            odd.job_or_sentence(odd.changed(context(field), [change]))
