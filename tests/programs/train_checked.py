"""``train.py`` with its replicas checked, and a signal or a halt at a step.

python tests/programs/train_checked.py FATE --config=... (flags of train.py)

FATE is "end", or "kill" or "terminate" and the step after which that signal comes, as
in "kill30", or "hold" and the step whose checkpoint is never finished: the program then
waits for its end. Prints a fingerprint of each state that is saved or reported.
"""

import hashlib
import os
import re
import signal
import sys
import threading
import time

import jax
import numpy as np
from absl import app, logging

import train

SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}


def meet(fate):
    """Sends this process a signal when it has the batch after a step, then dawdles."""
    kind, step = re.fullmatch(r"([a-z]+)(\d*)", fate).groups()
    split, taken = train.split_over_devices, []

    def send(batch):
        taken.append(batch)
        if kind in SIGNALS and len(taken) == int(step) + 1:
            os.kill(os.getpid(), SIGNALS[kind])
        if kind in SIGNALS and len(taken) > int(step):
            time.sleep(0.5)  # word of the signal has to reach the other process
        return split(batch)

    train.split_over_devices = send
    if kind == "hold":
        hold_checkpoint(step)


def hold_checkpoint(step):
    """Stops the writing of a step's checkpoint before it gets its name."""
    rename = os.rename

    def held(source, target, **options):
        if os.path.basename(target) == step:
            threading.Event().wait()
        rename(source, target, **options)

    os.rename = held


def check_replicas():
    """Compares all replicas bit by bit where one of them is taken."""
    unreplicate = train.jax_utils.unreplicate

    def compare(tree):
        for leaf in jax.tree.leaves(jax.device_get(tree)):
            assert len(leaf) == jax.local_device_count() > 1
            assert len({replica.tobytes() for replica in leaf}) == 1
        one = unreplicate(tree)
        print("replicas agree:", fingerprint(one), flush=True)
        return one

    train.jax_utils.unreplicate = compare


def fingerprint(tree):
    """A few digits that tell trees apart."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    meet(sys.argv.pop(1))
    check_replicas()
    logging.set_verbosity(logging.ERROR)
    app.run(train.main, flags_parser=train.parse_flags)
