"""The input: which images, in which order, whoever reads them; and broken ones."""

import contextlib
import gc
import io
import types

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags
from PIL import Image

import imagenet_st3
from data import input_pipeline, sources
from errors import UserError

CLASSES = ("cat", "dog", "eel")
TRAIN, TEST = 22, 11  # images; neither is a multiple of the batch size


def encoded(number, size=20, kind="JPEG"):
    """An image whose mean brightness is about its number."""
    pixels = np.full((size + number % 3, size, 3), 5 * number, np.uint8)
    pixels[::4, :, number % 3] += 40
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Class folders, with a hidden file that is no image."""
    for split, count in (("train", TRAIN), ("val", TEST)):
        for number in range(count):
            path = tmp_path / split / CLASSES[number % 3] / f"{number:02}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(number))
    (tmp_path / "train" / "cat" / ".index").write_text("not an image")
    return tmp_path


def configure(folder, **data):
    """The settings of ImageNet on such a folder."""
    config = imagenet_st3.get_config()
    config.batch_size = 8
    settings = {
        "name": "folder",
        "dir": str(folder),
        "test_split": "val",
        "image_size": 8,
        "workers": 0,
    }
    config.data.update(settings | data)
    return config


def take(config, start=0, stop=6):
    """Batches of training images."""
    data = sources.load(config)
    with contextlib.closing(
        input_pipeline.train_batches(data, config, start, stop)
    ) as batches:
        return list(batches)


def take_test(config):
    data = sources.load(config)
    with contextlib.closing(input_pipeline.test_batches(data, config)) as batches:
        return list(batches)


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, other)


def shared(monkeypatch, read, processes):
    """What each of so many processes reads."""
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    parts = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(read())
    monkeypatch.undo()
    return parts


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(folder, monkeypatch, processes):
    config = configure(folder)
    alone = take(config)
    parts = shared(monkeypatch, lambda: take(config), processes)
    together = [
        jax.tree.map(lambda *xs: np.concatenate(xs), *batches)
        for batches in zip(*parts, strict=True)
    ]
    assert len(parts[0][0]["label"]) == 8 // processes
    assert_equal(together, alone)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_test_image_is_seen_once_over_all_processes(
    folder, monkeypatch, processes
):
    config = configure(folder)
    parts = shared(monkeypatch, lambda: take_test(config), processes)
    assert {len(batches) for batches in parts} == {2}
    valid = [b["image"][b["valid"]] for batches in parts for b in batches]
    seen = sorted(np.concatenate(valid).mean(axis=(1, 2, 3)).round())
    assert len(set(seen)) == len(seen) == TEST


def test_batches_depend_on_their_number_alone(folder):
    config = configure(folder)
    assert_equal(take(config)[4:], take(config, start=4))


def test_an_epoch_has_every_image_once_in_its_own_order_and_crops(folder):
    config = configure(folder)
    config.batch_size = 11
    epochs = [take(config, 0, 2), take(config, 2, 4)]
    images = [np.concatenate([b["image"] for b in batches]) for batches in epochs]
    labels = [np.concatenate([b["label"] for b in batches]) for batches in epochs]
    brightness = [x.mean(axis=(1, 2, 3)).round(-1) for x in images]
    for some in labels:
        assert np.bincount(some).tolist() == [8, 7, 7]
    assert brightness[0].tolist() != brightness[1].tolist()
    assert not {x.tobytes() for x in images[0]} & {x.tobytes() for x in images[1]}
    plain = configure(folder, augmentation="none")
    plain.batch_size = 11
    first, second = (
        {x.tobytes() for b in take(plain, start, start + 2) for x in b["image"]}
        for start in (0, 2)
    )
    assert first == second
    assert len(first) == TRAIN


def test_another_seed_is_another_order(folder):
    config = configure(folder)
    before = [batch["label"].tolist() for batch in take(config)]
    config.seed = 1
    assert before != [batch["label"].tolist() for batch in take(config)]


def test_images_that_fill_no_batch_wait_for_another_epoch(folder):
    config = configure(folder, augmentation="none")
    batches = take(config, 0, 40)  # twenty epochs of two batches: 16 of 22 images
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        images = [x.tobytes() for b in (first, second) for x in b["image"]]
        assert len(set(images)) == 16
    assert len({x.tobytes() for b in batches for x in b["image"]}) == TRAIN


@pytest.fixture
def no_garbage_collection():
    """Keeps it from freeing the semaphores of workers while others are started.

    From within its list of semaphores, Python's ``multiprocessing`` can not be asked to
    strike one off, and warns.
    """
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@pytest.mark.usefixtures("no_garbage_collection")
def test_worker_processes_make_the_same_batches(folder):
    flags.FLAGS.mark_as_parsed()  # as the program does
    config = configure(folder)
    alone = take(config)
    config.data.workers = 2
    assert_equal(take(config), alone)
    (folder / "train" / "dog" / "01.JPEG").write_bytes(b"not an image")
    with pytest.raises(Exception, match=r"dog/01\.JPEG cannot be read"):
        take(config)


BROKEN = {"text": b"not an image", "empty": b"", "cut": encoded(4)[:-60]}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_broken_image_is_named(folder, content, in_memory):
    (folder / "train" / "dog" / "04.JPEG").write_bytes(content)
    config = configure(folder, in_memory=in_memory, augmentation="none")
    with pytest.raises(UserError, match=r"train/dog/04\.JPEG cannot be read \(.+\): "):
        take(config, 0, 20)


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_images_can_be_left_out(folder, content):
    for path in ("train/dog/04.JPEG", "val/dog/07.JPEG"):
        (folder / path).write_bytes(content)
    config = configure(folder, broken_images="skip")
    config.batch_size = TRAIN
    (batch,) = take(config, 0, 1)
    assert batch["valid"].sum() == TRAIN - 1
    assert sum(b["valid"].sum() for b in take_test(config)) == TEST - 1
    config.data.update(in_memory=True, augmentation="none")
    config.batch_size = 7
    assert len(sources.load(config).train) == TRAIN - 1
    assert all(b["valid"].all() for b in take(config, 0, 3))


def test_a_folder_without_class_folders_is_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"no class folders in .*/test: config\.data"):
        sources.load(configure(folder, test_split="test"))
    (folder / "val" / "yak").mkdir()
    with pytest.raises(UserError, match=r"class 'yak' is in .*/val but not in .*/t"):
        sources.load(configure(folder))


def test_labels_are_the_classes_in_sorted_order(folder):
    (folder / "val" / "cat").rename(folder / "cat")  # a class without test images
    data = sources.load(configure(folder))
    assert data.num_classes == 3
    names = {data.train[i]["name"]: data.train[i]["label"] for i in range(TRAIN)}
    assert names == {
        str(folder / "train" / CLASSES[i % 3] / f"{i:02}.JPEG"): i % 3
        for i in range(TRAIN)
    }
    assert {data.test[i]["label"] for i in range(len(data.test))} == {1, 2}


SETS = {  # name, splits, shape of an image
    "imagenet2012": ("train", "validation", (40, 50, 3)),
    "imagenette/320px-v2": ("train", "validation", (40, 50, 3)),
    "cifar10": ("train", "test", (32, 32, 3)),
    "cifar100": ("train", "test", (32, 32, 3)),
    "fashion_mnist": ("train", "test", (28, 28, 1)),
}


def write(name, splits, shape, data_dir):
    """A few images in the layout of TFDS's own set, written with its own features."""
    own = tfds.builder_cls(name.partition("/")[0])
    features = tfds.builder(name, data_dir=data_dir).info.features

    def examples(self, split):
        for number in range(12):
            pixels = np.full(shape, 20 * number, np.uint8)
            image = Image.fromarray(pixels.squeeze())
            example = {"image": image, "label": number % 10}
            extra = {
                "file_name": f"{number}.JPEG",
                "id": str(number),
                "coarse_label": 0,
            }
            yield number, example | {k: v for k, v in extra.items() if k in features}

    small = type(
        "Small",
        (own,),
        {
            "name": own.name,
            "pkg_dir_path": own.pkg_dir_path,
            "MANUAL_DOWNLOAD_INSTRUCTIONS": None,
            "_split_generators": lambda self, manager: {
                split: examples(self, split) for split in splits
            },
        },
        skip_registration=True,
    )
    config = name.partition("/")[2] or None
    builder = small(data_dir=data_dir, file_format="array_record", config=config)
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()


@pytest.mark.parametrize("name", SETS)
def test_data_sets_of_tfds_are_read(name, tmp_path):
    train, test, shape = SETS[name]
    write(name, (train, test), shape, tmp_path)
    config = configure(tmp_path, name=name, train_split=train, test_split=test)
    config.data.update(mean=(0.5,) * shape[2], std=(0.2,) * shape[2])
    data = sources.load(config)
    assert (len(data.train), len(data.test)) == (12, 12)
    batch = take(config, 0, 1)[0]
    assert batch["image"].shape == (8, 8, 8, shape[2])
    levels = batch["image"].mean(axis=(1, 2, 3)) / 20
    np.testing.assert_allclose(levels.round() % 10, batch["label"])
    config.data.broken_images = "stop"
    assert "number 3 of" in data.train[3]["name"] or data.train[3]["name"][0].isdigit()


def test_a_data_set_without_labels_is_refused(tmp_path, monkeypatch):
    class Unlabelled:
        data_path = tmp_path

        class info:  # noqa: N801  as TFDS has it
            features = types.MappingProxyType({"image": None, "caption": None})

    monkeypatch.setattr(sources, "_builder", lambda config: Unlabelled)
    monkeypatch.setattr(sources, "_prepared", lambda builder, config: builder)
    with pytest.raises(UserError, match="no image and label, but image, caption"):
        sources.load(configure(tmp_path, name="captions"))
