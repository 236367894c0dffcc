"""Batches of a data set, the same for a seed whatever reads them.

The order of all images is fixed by the seed and the epoch, and a batch by its number:
not by how many processes share it or by how many workers decode it. So the position of
the input is the number of batches taken, and a run can go on with other machines.
"""

import multiprocessing
import os
import signal
import sys
import threading
from typing import Any, Self

import grain
import jax
import ml_collections
import numpy as np

from data.decoding import random_resized_crop, resized_centre
from data.source import Unreadable, read
from data.sources import Data
from errors import UserError

__all__ = ["steps_per_epoch", "test_batches", "train_batches"]

QUIET = "ignore:resource_tracker:UserWarning"
"""What a stopped run has read ahead is freed by Python, which need not say so."""


class _Load(grain.transforms.RandomMap):
    """From an example's number to its pixels, as large as the network's input."""

    def __init__(self, source: Any, config: ml_collections.ConfigDict):
        self.source = source
        self.size = config.data.image_size
        self.channels = len(config.data.mean)
        self.max_pixels = config.data.max_pixels
        self.stop = config.data.broken_images == "stop"

    def map(self, index: int) -> dict[str, Any]:
        """As ``random_map``, where nothing is random."""
        return self.random_map(index, None)

    def random_map(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        """The example; ``valid`` is False if it is broken or past the end."""
        image = np.zeros((self.size, self.size, self.channels), np.uint8)
        if index >= len(self.source):
            return _example(image, 0, valid=False)
        try:
            example = read(self.source, index, lambda x: self.pixels(x, rng))
        except Unreadable:
            if self.stop:
                raise
            return _example(image, 0, valid=False)
        return _example(example["image"], example["label"], valid=True)

    def pixels(self, image: Any, rng: np.random.Generator | None) -> Any:
        """Decodes and crops; pixels that are kept in memory are as they must be."""
        if isinstance(image, np.ndarray):
            return image
        if rng is not None:
            return random_resized_crop(
                image, self.channels, self.size, rng, self.max_pixels
            )
        return resized_centre(image, self.channels, self.size, self.max_pixels)


def _example(image: Any, label: int, valid: bool) -> dict[str, Any]:
    return {"image": image, "label": np.int32(label), "valid": np.bool_(valid)}


def steps_per_epoch(data: Data, config: ml_collections.ConfigDict) -> int:
    """Optimizer steps in an epoch; images that fill no batch wait for another one."""
    return len(data.train) // config.batch_size


def _stream(
    source: Any, order: Any, config: ml_collections.ConfigDict, train: bool
) -> Any:
    """This process's part of each batch of the examples that ``order`` numbers."""
    processes, process = jax.process_count(), jax.process_index()
    load = _Load(source, config)
    crops = train and config.data.augmentation == "resized_crop"
    stream = order.random_map(load) if crops else order.map(load.map)
    return stream.batch(config.batch_size // processes)[process::processes]


def _iterate(stream: Any, config: ml_collections.ConfigDict) -> Any:
    """Reads ahead in worker processes, or in threads of this one."""
    if config.data.in_memory:
        return stream.to_iter_dataset(grain.ReadOptions(0, 0))
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    workers = grain.MultiprocessingOptions(config.data.workers)
    if workers.num_workers and QUIET not in sys.warnoptions:
        sys.warnoptions.append(QUIET)
    return stream.to_iter_dataset(ahead).mp_prefetch(workers, _obey_parent)


class _Batches:
    """An iterator of Grain's that says in a sentence if a worker process is lost."""

    def __init__(self, stream: Any, config: ml_collections.ConfigDict):
        self._batches = iter(_iterate(stream, config))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            return next(self._batches)
        except RuntimeError as error:
            if "exit code" not in str(error):
                raise
            raise UserError(
                "a process that decodes images has ended before its time, as one that "
                "is killed when memory runs out: with fewer config.data.workers the "
                "same command goes on from the last checkpoint"
            ) from None

    def close(self) -> None:
        """Ends the worker processes."""
        self._batches.close()


def _obey_parent(worker: int, workers: int) -> None:
    """Leaves signals to the parent of this worker process, and ends when it does."""
    del worker, workers
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def outlive(parent: Any) -> None:
        parent.join()
        os._exit(1)

    parent = multiprocessing.parent_process()
    threading.Thread(target=outlive, args=[parent], daemon=True).start()


def train_batches(
    data: Data, config: ml_collections.ConfigDict, start: int, stop: int | None = None
) -> _Batches:
    """This process's part of the batches from number ``start`` to before ``stop``.

    Without ``stop`` they do not end. Each epoch has every image once, in another order
    and cropped otherwise, but for those that fill no batch.

    Returns:
        Iterator, to be closed after use, of ``{"image": uint8 [B, H, W, C],
        "label": int32 [B], "valid": bool [B]}``, with B the batch size by the number of
        processes; an image that is left out as broken is not valid.
    """
    images = steps_per_epoch(data, config) * config.batch_size
    order = grain.MapDataset.range(len(data.train)).seed(config.seed).shuffle()
    stream = _stream(data.train, order[:images], config, train=True)
    return _Batches(stream.repeat()[start:stop], config)


def test_batches(data: Data, config: ml_collections.ConfigDict) -> _Batches:
    """This process's part of the test images: each exactly once over all processes.

    Returns:
        Iterator as from ``train_batches``; what fills up the last batch is not valid.
    """
    batches = -(-len(data.test) // config.batch_size)
    order = grain.MapDataset.range(batches * config.batch_size).seed(config.seed)
    return _Batches(_stream(data.test, order, config, train=False), config)
