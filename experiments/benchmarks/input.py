"""Images per second of the input, next to tf.data doing the same work.

python experiments/benchmarks/input.py --tensorflow=/path/to/venv/bin/python

``--tensorflow`` is a Python that has TensorFlow; without it, tf.data is left out. Makes
JPEGs of about the sizes of ImageNet's in class folders, and times, in turns within one
run:

* files to random crops of 224 pixels on one core, in seconds of the processor: ours in
  a loop, tf.data with one thread;
* batches of the training program's input on two cores, in seconds on the clock: ours
  with threads, with one and with two worker processes, tf.data with two threads.

Both crop 8 to 100 % of the area at an aspect ratio of 3/4 to 4/3. The crops that
TensorFlow draws are smaller on average, so it is also timed on ours. Only the ratios
mean anything.
"""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from absl import flags
from harness import run_main
from PIL import Image
from rich.console import Console
from rich.table import Table

import imagenet_st3
from data import decoding, input_pipeline, sources

TENSORFLOW = flags.DEFINE_string("tensorflow", "", "A Python with TensorFlow, if any.")
IMAGES = flags.DEFINE_integer("images", 256, "How many to make.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed turns of each row.")
BATCHES = flags.DEFINE_integer("batches", 8, "Batches of each turn.")
SIZE, BATCH, CLASSES = 224, 64, 4
BUFFERED = 16  # batches that may wait ready made when a turn begins
PAUSE = 2.0  # seconds in which those are made, while nothing is timed

# Runs in the other interpreter: prints seconds for each line that it reads.
TF_DATA = """
import json, os, sys, time

task = json.loads(sys.stdin.readline())
folder, cores, threads, batch, size, boxes, batches, buffered, pause = task
os.sched_setaffinity(0, cores)
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf

def place(encoded, box):
    if boxes:
        return box
    begin, extent, _ = tf.image.sample_distorted_bounding_box(
        tf.io.extract_jpeg_shape(encoded),
        tf.zeros([1, 0, 4]),
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], extent[:2]], 0)

def load(file, box):
    encoded = tf.io.read_file(file)
    part = tf.image.decode_and_crop_jpeg(encoded, place(encoded, box), channels=3)
    return tf.cast(tf.round(tf.image.resize(part, [size, size])), tf.uint8)

files = sorted(tf.io.gfile.glob(folder + "/*/*"))
repeated = files * (len(boxes) // len(files)) if boxes else files
data = tf.data.Dataset.from_tensor_slices((repeated, boxes or [[0] * 4] * len(files)))
calls = None if threads == 1 else threads
data = data.repeat().map(load, num_parallel_calls=calls).batch(batch)
options = tf.data.Options()
options.autotune.enabled = False
options.threading.private_threadpool_size = threads
images = iter(data.with_options(options))
clock = time.process_time if threads == 1 else time.perf_counter
for _ in sys.stdin:
    for _ in range(buffered):
        next(images)
    start = clock()
    for _ in range(batches):
        next(images)
    seconds = clock() - start
    time.sleep(pause)
    print(seconds, flush=True)
"""


def picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Clouds with edges, of about the spectrum that photographs have."""

    def clouds(power: float) -> np.ndarray:
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
        frequency[0, 0] = 1 / max(height, width)
        noise = np.fft.rfft2(rng.standard_normal((height, width)))
        values = np.fft.irfft2(noise / frequency**power, (height, width))
        return (values - values.mean()) / values.std()

    light = clouds(1.3) + 0.7 * np.sign(clouds(1.8))
    red, blue = clouds(1.4), clouds(1.4)
    colours = [light + 0.35 * red, light - 0.15 * red - 0.1 * blue, light + 0.4 * blue]
    pixels = (122 + 45 * np.stack(colours, -1)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


def image_size(rng: np.random.Generator) -> tuple[int, int]:
    """Height and width: mostly 375 by 500 or turned, few are large."""
    kind = rng.uniform()
    if kind < 0.55:
        return (375, 500) if rng.uniform() < 0.7 else (500, 375)
    low, high = (200, 600) if kind < 0.97 else (800, 2000)
    height, width = rng.integers(low, high, 2)
    return int(height), int(width)


def make_images(folder: pathlib.Path) -> str:
    """Writes the class folders of two splits; returns what was written, in words."""
    rng = np.random.default_rng(0)
    sizes, lengths = [], []
    for i in range(IMAGES.value):
        sizes.append(image_size(rng))
        file = io.BytesIO()
        quality, subsampling = int(rng.integers(88, 97)), 2 * int(rng.uniform() < 0.6)
        image = picture(rng, *sizes[-1])
        image.save(file, "JPEG", quality=quality, subsampling=subsampling)
        lengths.append(len(file.getvalue()))
        for split in ("train", "val") if i < CLASSES else ("train",):
            path = folder / split / f"class{i % CLASSES}" / f"{i:05}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
    height, width = np.mean(sizes, 0)
    return (
        f"{len(sizes)} images, on average {height:.0f} x {width:.0f} pixels and "
        f"{np.mean(lengths) / 1e3:.0f} kB"
    )


Turn = Callable[[], float]  # the seconds that all batches of a turn take


def crops_on_one_core(files: list[pathlib.Path]) -> Turn:
    """Ours, in a loop."""
    rng = np.random.default_rng(0)
    order = (files[i % len(files)] for i in range(sys.maxsize))

    def turn() -> float:
        start = time.process_time()
        for _ in range(BATCHES.value):
            np.stack(
                [
                    decoding.random_resized_crop(next(order).read_bytes(), 3, SIZE, rng)
                    for _ in range(BATCH)
                ]
            )
        return time.process_time() - start

    return turn


def our_crops(files: list[pathlib.Path]) -> list[list[int]]:
    """For several passes over the files: top, left, height and width."""
    rng = np.random.default_rng(1)
    found = []
    for file in files * 8:
        with Image.open(file) as image:
            size = image.height, image.width
        box = decoding._random_box(*size, rng)
        left, top, right, bottom = map(int, box or decoding._centre_box(*size))
        found.append([top, left, bottom - top, right - left])
    return found


@contextlib.contextmanager
def tf_data(
    folder: pathlib.Path, threads: int, boxes: list[list[int]]
) -> Iterator[Turn]:
    """The other side, on as many cores as threads; it draws crops if given none."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    task = (str(folder), cores, threads, BATCH, SIZE, boxes, BATCHES.value)
    with subprocess.Popen(
        [TENSORFLOW.value, "-c", TF_DATA],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        commands, answers = other.stdin, other.stdout

        def turn() -> float:
            print(file=commands, flush=True)
            return float(answers.readline())

        print(json.dumps((*task, BUFFERED, PAUSE)), file=commands, flush=True)
        yield turn


@contextlib.contextmanager
def whole_input(folder: pathlib.Path, workers: int) -> Iterator[Turn]:
    """The training program's, up to batches of uint8."""
    config = imagenet_st3.get_config()
    config.data.name, config.data.dir = "folder", str(folder)
    config.data.test_split = "val"
    config.data.workers, config.batch_size = workers, BATCH
    data = sources.load(config)
    batches = input_pipeline.train_batches(data, config, start=0)

    def turn() -> float:
        for _ in range(BUFFERED):
            next(batches)
        start = time.perf_counter()
        for _ in range(BATCHES.value):
            next(batches)
        seconds = time.perf_counter() - start
        time.sleep(PAUSE)
        return seconds

    with contextlib.closing(batches):
        yield turn


def images_per_second(turns: dict[str, Turn]) -> dict[str, float]:
    """Medians over the rounds, in which each has its turn; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(1 + ROUNDS.value):
        for name, turn in turns.items():
            seconds[name].append(turn())
    images = BATCH * BATCHES.value
    return {name: images / float(np.median(s[1:])) for name, s in seconds.items()}


def print_table(title: str, speeds: dict[str, float]) -> None:
    """All rows next to each of tf.data's."""
    others = [name for name in speeds if name.startswith("tf.data")]
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("images per second", *(f"times {name}" for name in others)):
        table.add_column(column, justify="right")
    for name, speed in speeds.items():
        ratios = [f"{speed / speeds[other]:.2f}" for other in others]
        table.add_row(name, f"{speed:,.0f}", *ratios)
    Console().print(table)


def time_crops(folder: pathlib.Path) -> None:
    """Prints the table for one core."""
    files = sorted(folder.glob("*/*"))
    turns = {"ours": crops_on_one_core(files)}
    with contextlib.ExitStack() as stack:
        if TENSORFLOW.value:
            for name, boxes in (
                ("tf.data", []),
                ("tf.data, our crops", our_crops(files)),
            ):
                turns[name] = stack.enter_context(tf_data(folder, 1, boxes))
        print_table("random crops, one core", images_per_second(turns))


def time_whole_input(folder: pathlib.Path) -> None:
    """Prints the table for two cores."""
    turns = {}
    with contextlib.ExitStack() as stack:
        for name, workers in (("threads", 0), ("one worker", 1), ("two workers", 2)):
            turns[name] = stack.enter_context(whole_input(folder, workers))
        if TENSORFLOW.value:
            turns["tf.data"] = stack.enter_context(tf_data(folder / "train", 2, []))
        print_table("batches for training, two cores", images_per_second(turns))


def main(argv: list[str]) -> None:
    """Makes the images and prints both tables."""
    del argv
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        Console().print(make_images(folder))
        time_crops(folder / "train")
        time_whole_input(folder)


if __name__ == "__main__":
    run_main(main)
