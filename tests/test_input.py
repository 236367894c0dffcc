"""The input: which images, in which order, whoever reads them; and broken ones."""

import collections
import contextlib
import gc
import io
import multiprocessing
import os
import pathlib
import shutil
import socket
import tempfile
import types

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags
from PIL import Image

import imagenet_st3
from data import files, folders, input_pipeline, sources
from data import records as records_of_tfds
from data.headers import BrokenImage
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
    with pytest.raises(UserError, match=r"dog/01\.JPEG cannot be read \(no whole"):
        take(config)


@pytest.mark.usefixtures("no_garbage_collection")
def test_a_worker_process_that_is_lost_is_told(folder):
    flags.FLAGS.mark_as_parsed()
    config = configure(folder, workers=2)
    batches = input_pipeline.train_batches(sources.load(config), config, 0)
    next(batches)
    for child in multiprocessing.active_children():
        child.kill()
    lost = pytest.raises(
        UserError, match="process that decodes images has ended before"
    )
    with contextlib.closing(batches), lost:
        collections.deque(batches, maxlen=0)  # some were ready


def avif(content):
    """What begins as another format does; Pillow's plugin would fail in its own way."""
    return (20).to_bytes(4) + b"ftypavif" + bytes(8) + content


def replaced(path, make):
    path.unlink()
    make(path)


BROKEN = {  # what happens to the file of an image, the reason against it
    "text": (lambda x: x.write_bytes(b"not an image"), "no whole JPEG, PNG, WEBP, GIF"),
    "empty": (lambda x: x.write_bytes(b""), "no whole JPEG"),
    "cut": (lambda x: x.write_bytes(encoded(4)[:-60]), "Premature end of JPEG file"),
    "AVIF": (lambda x: x.write_bytes(avif(bytes(50))), "no whole JPEG"),
    "BLP": (lambda x: x.write_bytes(b"BLP2" + bytes(50)), "no whole JPEG"),
    "gone": (lambda x: x.unlink(), "No such file or directory"),
    "FIFO": (lambda x: replaced(x, os.mkfifo), "it is no ordinary file"),
    "device": (
        lambda x: replaced(x, lambda x: x.symlink_to("/dev/zero")),
        "it is no ordinary file",
    ),
    "socket": (
        lambda x: replaced(x, lambda x: bind(x)),
        "No such device or address",
    ),
    "loop": (
        lambda x: replaced(x, lambda x: x.symlink_to(x)),
        "Too many levels of symbolic links",
    ),
    "dangling link": (
        lambda x: replaced(x, lambda x: x.symlink_to("nowhere")),
        "No such file or directory",
    ),
    "folder": (lambda x: replaced(x, pathlib.Path.mkdir), "Is a directory"),
    "a terabyte": (
        lambda x: os.truncate(x, 10**12),
        "it has 1,000,000,000,000 bytes, too many for config.data.max_pixels 64,",
    ),
}


def bind(path):
    """Makes a socket, whose path is short or is refused."""
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


@pytest.mark.parametrize(("damage", "reason"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_broken_image_is_named(folder, damage, reason, in_memory, monkeypatch):
    config = configure(folder, in_memory=in_memory, augmentation="none")
    path = folder / "train" / "dog" / "04.JPEG"
    damaged_when_listed(monkeypatch, lambda: damage(path))
    with pytest.raises(UserError) as error:
        take(config, 0, 20)
    assert f"the image {path} cannot be read ({reason}" in str(error.value)
    assert str(error.value).endswith("with --config.data.broken_images=skip")


def damaged_when_listed(monkeypatch, damage):
    """Does it after the names of all files are known."""
    open_folder = sources.open_folder

    def opened(config):
        data = open_folder(config)
        damage()
        return data

    monkeypatch.setattr(sources, "open_folder", opened)


@pytest.mark.parametrize(("damage", "reason"), BROKEN.values(), ids=BROKEN)
def test_broken_images_can_be_left_out(folder, damage, reason):
    config = configure(folder, broken_images="skip")
    config.batch_size = TRAIN
    data = sources.load(config)
    for path in ("train/dog/04.JPEG", "val/dog/07.JPEG"):
        damage(folder / path)
    with contextlib.closing(input_pipeline.train_batches(data, config, 0, 1)) as some:
        (batch,) = some
    assert batch["valid"].sum() == TRAIN - 1
    with contextlib.closing(input_pipeline.test_batches(data, config)) as some:
        assert sum(batch["valid"].sum() for batch in some) == TEST - 1


@pytest.mark.parametrize(("damage", "reason"), BROKEN.values(), ids=BROKEN)
def test_images_in_memory_are_counted_when_they_are_left_out(folder, damage, reason):
    for path in ("train/dog/04.JPEG", "val/dog/07.JPEG"):
        damage(folder / path)
    config = configure(
        folder, broken_images="skip", in_memory=True, augmentation="none"
    )
    config.batch_size = 7
    data = sources.load(config)
    assert (len(data.train), len(data.test)) == (TRAIN - 1, TEST - 1)
    path = folder / "train/dog/04.JPEG"
    listed = os.path.lexists(path) and not path.is_dir()
    assert (data.skipped_train, data.skipped_test) == (listed, listed)
    assert all(b["valid"].all() for b in take(config, 0, 3))


def test_links_to_files_and_folders_are_what_they_point_to(folder):
    outside = folder / "outside"
    (folder / "train" / "cat").rename(outside)
    (folder / "train" / "cat").symlink_to(outside)
    (outside / "00.JPEG").rename(folder / "image")
    (outside / "00.JPEG").symlink_to(folder / "image")
    config = configure(folder)
    config.batch_size = TRAIN
    assert take(config, 0, 1)[0]["valid"].all()


@contextlib.contextmanager
def as_nobody():
    """Without the rights of root, who may read anything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def public():
    """A folder that everybody may look into."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        path.chmod(0o755)
        yield path


def test_what_may_not_be_read_is_a_sentence(public):
    file, inner = public / "image", public / "class"
    file.write_bytes(encoded(0))
    inner.mkdir()
    for path in (file, inner):
        path.chmod(0)
    with as_nobody(), pytest.raises(BrokenImage, match=r"^Permission denied$"):
        files.read_file(str(file), 100)
    with as_nobody(), pytest.raises(UserError) as error:
        folders._visible(inner, folders=False)
    assert str(error.value).startswith(
        f"the folder {inner} cannot be read (Permission denied): see whether"
    )


def test_a_file_has_no_more_bytes_than_its_pixels_can_need(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(2**20 + 80))
    assert len(files.read_file(str(path), 10)) == 2**20 + 80
    with pytest.raises(
        BrokenImage, match="it has 1,048,656 bytes, too many for config"
    ):
        files.read_file(str(path), 9)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("split", ["train", "val"])
def test_nothing_to_read_is_refused_before_the_first_step(folder, split, in_memory):
    paths = sorted((folder / split).rglob("*.JPEG"))
    for path in paths:
        path.write_bytes(b"not an image")
    config = configure(
        folder, broken_images="skip", in_memory=in_memory, augmentation="none"
    )
    with pytest.raises(UserError) as error:
        sources.load(config)
    assert str(error.value).startswith(
        f"config.data.broken_images is 'skip', but none of {len(paths)} images can be "
        f"read: the image {paths[0]} cannot be read (no whole JPEG"
    )
    config.data.broken_images = "stop"
    with pytest.raises(UserError, match=f"^the image {paths[0]} cannot be read "):
        sources.load(config)
    for path in paths:
        path.unlink()
    with pytest.raises(UserError, match=r"has no image: name|the 0 training images"):
        sources.load(config)


def test_not_every_image_is_tried_before_the_first_step(folder, monkeypatch):
    monkeypatch.setattr(sources, "MOST_TRIED", 3)
    paths = sorted((folder / "train").rglob("*.JPEG"))
    config = configure(folder, broken_images="skip")
    for path in paths[:2]:
        path.write_bytes(b"not an image")
    assert len(sources.load(config).train) == TRAIN
    paths[2].write_bytes(b"not an image")
    with pytest.raises(UserError, match="but none of 3 images can be read: the image"):
        sources.load(config)


def test_images_that_are_left_out_are_named_when_too_few_are_left(folder):
    for path in sorted((folder / "train").rglob("*.JPEG"))[3:]:
        path.write_bytes(b"not an image")
    config = configure(
        folder, broken_images="skip", in_memory=True, augmentation="none"
    )
    with pytest.raises(UserError) as error:
        sources.load(config)
    assert str(error.value) == (
        "config.batch_size 8 is more than the 3 training images of 'folder', without "
        "19 that cannot be read: make it smaller"
    )


def test_the_limit_on_pixels_is_that_of_the_configuration(folder):
    config = configure(folder, max_pixels=22 * 20 - 1)  # the largest are just too large
    with pytest.raises(UserError, match=r"says 20 x 22 pixels, more than config.da"):
        take(config, 0, 20)
    config.data.update(in_memory=True, augmentation="none", broken_images="skip")
    data = sources.load(config)
    assert data.skipped_train == len(range(2, TRAIN, 3))
    config.data.max_pixels += 1
    assert sources.load(config).skipped_train == 0


def test_a_folder_without_class_folders_is_named(folder, tmp_path, monkeypatch):
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


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A data set of TFDS; a copy of it, and its configuration, for each call."""
    made = tmp_path_factory.mktemp("made")
    write("imagenet2012", *(("train", "validation"), (40, 50, 3), made))

    def copied(folder, **data):
        shutil.copytree(made, folder, dirs_exist_ok=True)
        (version,) = folder.glob("imagenet2012/*")
        splits = {"train_split": "train", "test_split": "validation"}
        return version, configure(folder, name="imagenet2012", **splits, **data)

    return copied


def shard_of(version, split):
    (path,) = version.glob(f"*-{split}.array_record-*")
    return path


def flipped(contents, number):
    """With a bit of the so manieth JPEG changed."""
    place = -1
    for _ in range(number):
        place = contents.index(b"\xff\xd8\xff", place + 1)
    return contents[: place + 99] + b"\x55" + contents[place + 100 :]


NUMBER_0 = "the image number 0 of the split '{split}' in {version} cannot be read ("
SHARDS = {  # what happens to the file of a split, how the sentence begins
    "missing": (lambda x: x.unlink(), "{path} is missing: copy the data set again"),
    "empty": (lambda x: x.write_bytes(b""), "{path} is empty: copy the data set"),
    "folder": (lambda x: replaced(x, pathlib.Path.mkdir), "{path} is missing: copy"),
    "FIFO": (lambda x: replaced(x, os.mkfifo), "{path} is missing: copy the data set"),
    "cut": (lambda x: os.truncate(x, x.stat().st_size // 2), NUMBER_0),
    "short": (lambda x: os.truncate(x, 1000), NUMBER_0),
    "junk": (lambda x: x.write_bytes(b"junk" * 50_000), NUMBER_0),
}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(("damage", "sentence"), SHARDS.values(), ids=SHARDS)
def test_files_of_records_that_are_not_whole_are_named(
    damage, sentence, split, records, tmp_path
):
    version, config = records(tmp_path)
    path = shard_of(version, split)
    damage(path)
    with pytest.raises(UserError) as error:
        sources.load(config)
    text = str(error.value)
    assert text.startswith(sentence.format(path=path, split=split, version=version))
    assert "\n" not in text
    if sentence == NUMBER_0:
        assert "): prepare the data set again, or leave such images out" in text
        config.data.broken_images = "skip"
        with pytest.raises(
            UserError, match="but none of 12 images can be read: the im"
        ):
            sources.load(config)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.usefixtures("no_garbage_collection")
def test_a_record_that_is_damaged_is_named_or_left_out(workers, records, tmp_path):
    flags.FLAGS.mark_as_parsed()
    version, config = records(tmp_path, workers=workers)
    config.batch_size = 12
    path = shard_of(version, "train")
    path.write_bytes(flipped(path.read_bytes(), 8))
    with pytest.raises(UserError) as error:
        take(config, 0, 1)
    assert str(error.value).startswith("the image number 7 of the split 'train' in ")
    config.data.broken_images = "skip"
    assert take(config, 0, 1)[0]["valid"].sum() == 11


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", "\0", '{"name": 3}'])
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_damaged_description_is_a_sentence(name, text, records, tmp_path):
    version, config = records(tmp_path)
    (version / name).unlink() if text is None else (version / name).write_text(text)
    with pytest.raises(UserError) as error:
        sources.load(config)
    assert str(error.value).startswith("the data set 'imagenet2012' ")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_data_set_without_labels_is_refused(tmp_path, monkeypatch):
    class Unlabelled:
        data_path = tmp_path

        class info:  # noqa: N801  as TFDS has it
            features = types.MappingProxyType({"image": None, "caption": None})

    monkeypatch.setattr(records_of_tfds, "_prepared", lambda config: Unlabelled)
    with pytest.raises(UserError, match="no image and label, but image, caption"):
        sources.load(configure(tmp_path, name="captions"))
