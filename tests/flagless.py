"""Modules of programs, imported such that their flags meet no other program's."""

import importlib
from unittest import mock

from absl import flags


def imported(name):
    """The module of this name; flags that it declares are only its own."""
    with mock.patch.dict(flags.FLAGS._flags(), clear=True):
        return importlib.import_module(name)
