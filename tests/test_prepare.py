"""Data sets that need no download: TFDS's own classes open what was written."""

import gzip
import io
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import imagenet_st3
import prepare
from data import sources
from data.builders.fashion_mnist import FashionMnist, read_idx
from data.builders.imagenet_rehearsal import ImagenetRehearsal, is_rehearsal
from errors import UserError

COUNTS = {"train": 30, "t10k": 20}
SPLITS = {"train": "train", "test": "t10k"}
IMAGES = {"train": 60, "validation": 20, "test": 5}
SKIP_DECODING = {"image": tfds.decode.SkipDecoding()}


def idx(array, code=8):
    """An idx file: two zeros, the code of the type, the axes and their sizes."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.tobytes()


def fake_files(folder):
    """Fashion-MNIST's four files, of random pixels; the arrays in them."""
    rng = np.random.default_rng(0)
    arrays = {}
    folder.mkdir()
    for prefix, count in COUNTS.items():
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = np.r_[0:10, rng.integers(0, 10, count - 10)].astype(np.uint8)
        arrays[prefix] = images, labels
        image_file = folder / f"{prefix}-images-idx3-ubyte.gz"
        image_file.write_bytes(gzip.compress(idx(images)))
        label_file = folder / f"{prefix}-labels-idx1-ubyte.gz"
        label_file.write_bytes(gzip.compress(idx(labels)))
    return arrays


def quietly(builder):
    """Writes a data set."""
    tfds.disable_progress_bar()
    prepare.write(builder)


def source_of(name, data_dir, split, **options):
    """A split as TFDS's own class reads it."""
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    assert builder.is_prepared()
    return builder.as_data_source(split, **options)


def on_disk(name, data_dir):
    """The data set as its files alone describe it."""
    return tfds.builder_from_directory(tfds.builder(name, data_dir=data_dir).data_path)


def assert_like_tfds(name, data_dir):
    """Name, version and features in the files are those of TFDS's own class."""
    files, own = on_disk(name, data_dir).info, tfds.builder_cls(name)
    reference = own(data_dir="/nowhere").info
    assert (files.name, str(files.version)) == (name, str(own.VERSION))
    assert files.supervised_keys == reference.supervised_keys
    assert files.features.to_json() == reference.features.to_json()
    assert files.features["label"].names == reference.features["label"].names
    assert repr(files.features) == repr(reference.features)
    written = files.features.get_serialized_info()
    assert written == reference.features.get_serialized_info()


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fashion")
    arrays = fake_files(folder / "source")
    options = {"data_dir": folder / "data", "file_format": "array_record"}
    quietly(FashionMnist(source=str(folder / "source"), **options))
    return folder, arrays


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsal")
    quietly(
        ImagenetRehearsal(images=IMAGES, data_dir=folder, file_format=prepare.FORMAT)
    )
    return folder


def test_fashion_mnist_is_what_tfds_would_have_written(fashion):
    assert_like_tfds("fashion_mnist", fashion[0] / "data")


def test_every_image_of_fashion_mnist_is_there_bit_by_bit(fashion):
    folder, arrays = fashion
    for split, prefix in SPLITS.items():
        source = source_of("fashion_mnist", folder / "data", split)
        images, labels = arrays[prefix]
        assert len(source) == len(labels)
        expected = {
            image.tobytes(): label for image, label in zip(images, labels, strict=True)
        }
        found = {}
        for example in source:
            assert example["image"].shape == (28, 28, 1)
            assert example["image"].dtype == np.uint8
            assert type(example["label"]) is int
            found[example["image"].tobytes()] = example["label"]
        assert found == expected


def test_images_are_shuffled_by_their_number_as_tfds_does(fashion):
    """The order depends on the keys alone; TFDS's class numbers its images from 0."""
    builder = FashionMnist(source=str(fashion[0] / "source"), data_dir="/nowhere")
    for split, prefix in SPLITS.items():
        keys = [key for key, _ in builder._split_generators(None)[split]]
        assert keys == list(range(COUNTS[prefix]))


DAMAGED = {  # what happens to a file, the sentence
    "missing": (lambda data: None, "is missing"),
    "not gzip": (lambda data: gzip.decompress(data), "cannot be read (Not a gzipped"),
    "cut": (lambda data: data[:-9], "cannot be read (Compressed file ended before"),
    "flipped bit": (
        lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        "cannot be read (CRC check failed",
    ),
    "empty": (lambda data: gzip.compress(b""), "is not an idx file of bytes with"),
    "header only": (lambda data: gzip.compress(gzip.decompress(data)[:6]), "is not an"),
    "too short": (
        lambda data: gzip.compress(gzip.decompress(data)[:-1]),
        "has ",
    ),
    "too long": (
        lambda data: gzip.compress(gzip.decompress(data) + b"x"),
        "has ",
    ),
    "other magic": (
        lambda data: gzip.compress(b"\0\0\x09" + gzip.decompress(data)[3:]),
        "is not an idx file of bytes with",
    ),
}


@pytest.mark.parametrize("name", ["train-images-idx3", "t10k-labels-idx1"])
@pytest.mark.parametrize(("damage", "sentence"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_with_the_package(name, damage, sentence, tmp_path):
    fake_files(tmp_path / "source")
    file = tmp_path / "source" / f"{name}-ubyte.gz"
    data = damage(file.read_bytes())
    file.unlink() if data is None else file.write_bytes(data)
    with pytest.raises(UserError) as error:
        prepare.prepare_fashion_mnist(str(file.parent), str(tmp_path / "data"))
    assert str(error.value).startswith(f"{file} {sentence}")
    assert "apt-get install --reinstall dataset-fashion-mnist" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


WRONG = {  # file, the array that it has instead, the sentence
    "axes": ("images-idx3", np.zeros(30, np.uint8), "is not an idx file of bytes with"),
    "size": ("images-idx3", np.zeros((30, 28, 27), np.uint8), "has images of 28x27"),
    "number": ("labels-idx1", np.zeros(29, np.uint8), "has 29 labels for 30 images"),
    "label": ("labels-idx1", np.full(30, 10, np.uint8), "has the label 10"),
}


@pytest.mark.parametrize(("name", "array", "sentence"), WRONG.values(), ids=WRONG)
def test_files_that_do_not_fit_are_named(name, array, sentence, tmp_path):
    fake_files(tmp_path / "source")
    file = tmp_path / "source" / f"train-{name}-ubyte.gz"
    file.write_bytes(gzip.compress(idx(array)))
    with pytest.raises(UserError) as error:
        prepare.prepare_fashion_mnist(str(file.parent), str(tmp_path / "data"))
    assert str(error.value).startswith(f"{file} {sentence}")


def test_idx_files_of_other_numbers_are_refused(tmp_path):
    file = tmp_path / "floats.gz"
    file.write_bytes(gzip.compress(idx(np.zeros(4, np.uint8), code=0x0D)))
    with pytest.raises(UserError, match="is not an idx file of bytes with 1 axes"):
        read_idx(file, 1)


def test_the_rehearsal_is_laid_out_as_imagenet(rehearsal):
    assert_like_tfds("imagenet2012", rehearsal)
    info = on_disk("imagenet2012", rehearsal).info
    assert {x.name: x.num_examples for x in info.splits.values()} == IMAGES
    assert len(info.features["label"].names) == 1000
    assert "not ImageNet" in info.description
    assert is_rehearsal(pathlib.Path(info.data_dir))


def test_images_of_the_rehearsal_look_like_photographs_to_a_program(rehearsal):
    source = source_of("imagenet2012", rehearsal, "train", decoders=SKIP_DECODING)
    images = [Image.open(io.BytesIO(example["image"])) for example in source]
    assert {image.format for image in images} == {"JPEG"}
    assert {image.mode for image in images} == {"RGB", "L"}
    assert len({image.size for image in images}) > len(images) / 2
    assert {image.width < image.height for image in images} == {True, False}
    assert all(80 <= min(image.size) <= max(image.size) <= 200 for image in images)
    decoded = source_of("imagenet2012", rehearsal, "train")[0]["image"]
    assert decoded.shape[2] == 3


def test_labels_of_the_rehearsal_are_those_of_imagenet(rehearsal):
    names = (
        tfds.builder_cls("imagenet2012")(data_dir="/nowhere")
        .info.features["label"]
        .names
    )
    for split in ("train", "validation"):
        examples = list(source_of("imagenet2012", rehearsal, split))
        labels = [example["label"] for example in examples]
        assert all(0 <= label < 1000 for label in labels)
        assert max(labels) > 500 > min(labels)
        files = [example["file_name"].decode() for example in examples]
        assert len(set(files)) == IMAGES[split]
        if split == "train":
            assert [file[:9] for file in files] == [names[label] for label in labels]
    test = list(source_of("imagenet2012", rehearsal, "test"))
    assert {example["label"] for example in test} == {-1}


def test_labels_can_be_learnt_from_the_images(rehearsal):
    """The nearest mean colour of the training images tells a label's last digit."""

    def points(split):
        examples = source_of("imagenet2012", rehearsal, split)
        colour = [x for x in examples if np.ptp(x["image"].mean((0, 1))) > 5]
        mean = np.array([x["image"].mean((0, 1)) for x in colour])
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        return mean, np.array([x["label"] % 10 for x in colour])

    train, kinds = points("train")
    test, expected = points("validation")
    guessed = kinds[np.argmax(test @ train.T, axis=1)]
    assert np.mean(guessed == expected) > 0.8


def test_a_rehearsal_depends_on_its_seed_alone(rehearsal, tmp_path):
    def records(folder, seed):
        if not folder.exists():
            options = {"data_dir": folder, "file_format": prepare.FORMAT}
            quietly(ImagenetRehearsal(images={"train": 60}, seed=seed, **options))
        source = source_of("imagenet2012", folder, "train", decoders=SKIP_DECODING)
        return [(x["file_name"], x["label"], x["image"]) for x in source]

    first = records(rehearsal, 0)
    validation = source_of(
        "imagenet2012", rehearsal, "validation", decoders=SKIP_DECODING
    )
    images = [image for *_, image in first] + [x["image"] for x in validation]
    assert len(set(images)) == len(images)
    assert records(tmp_path / "again", 0) == first
    other = records(tmp_path / "other", 1)
    assert not {image for *_, image in first} & {image for *_, image in other}


def test_a_rehearsal_has_a_folder_of_its_own(rehearsal, tmp_path, monkeypatch):
    def refused(data_dir, sentence):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError) as error:
            prepare.prepare_imagenet_rehearsal(data_dir, IMAGES, 0)
        assert sentence in str(error.value)
        assert sorted(tmp_path.rglob("*")) == before

    refused(None, "--data_dir is missing")
    real = tmp_path / "real" / "imagenet2012" / "5.0.0"
    real.mkdir(parents=True)
    refused(str(tmp_path / "real"), f"{real} is not a rehearsal, and stays as it is")
    (real / "dataset_info.json").write_text('{"description": "ILSVRC 2012"}')
    refused(str(tmp_path / "real"), f"{real} is not a rehearsal, and stays as it is")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "default"))
    refused(str(tmp_path / "default"), "is where TFDS looks for ImageNet")


def test_what_cannot_be_read_is_named(fashion, tmp_path):
    folder, _ = fashion
    version = tmp_path / "fashion_mnist" / str(FashionMnist.VERSION)
    version.mkdir(parents=True)

    def refused(sentence):
        with pytest.raises(UserError) as error:
            prepare.prepare_fashion_mnist(str(folder / "source"), str(tmp_path))
        assert str(error.value).startswith(f"{version} {sentence}")

    refused("holds no whole data set: remove that folder")
    for file in (folder / "data" / "fashion_mnist" / version.name).glob("*.json"):
        text = file.read_text().replace('"array_record"', '"tfrecord"')
        (version / file.name).write_text(text)
    refused("holds files of the format tfrecord, which cannot be read without TensorF")


def as_tfrecord(builder, folder):
    """The data set as TFDS writes it by default: records behind length and checksum."""
    old = pathlib.Path(builder.data_path)
    folder.mkdir(parents=True)
    for path in old.iterdir():
        if ".array_record-" not in path.name:
            text = path.read_text().replace('"array_record"', '"tfrecord"')
            (folder / path.name).write_text(text)
    for split in builder.info.splits:
        source = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        name = builder.info.splits[split].filenames[0]
        with (folder / name.replace(".array_record-", ".tfrecord-")).open("wb") as file:
            for record in source:
                length = struct.pack("<Q", len(record))
                file.write(length + checksum(length) + record + checksum(record))
    return folder


def crc_of_byte(crc):
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


CRC_OF_BYTE = [crc_of_byte(byte) for byte in range(256)]


def checksum(data):
    """TFRecord's masked CRC-32C."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_OF_BYTE[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def imagenet(folder, **data):
    """The configuration of ImageNet, small."""
    config = imagenet_st3.get_config()
    config.data.dir = str(folder)
    config.data.update(image_size=32, workers=0, **data)
    config.batch_size = 8
    return config


@pytest.fixture(scope="module")
def old(rehearsal, tmp_path_factory):
    """A rehearsal in TFRecord."""
    data_dir = tmp_path_factory.mktemp("old")
    builder = tfds.builder("imagenet2012", data_dir=rehearsal)
    return data_dir, as_tfrecord(builder, data_dir / builder.info.full_name)


def test_tfrecords_are_told_with_the_command_that_converts_them(old):
    with pytest.raises(UserError) as error:
        sources.load(imagenet(old[0]))
    assert "files of the format tfrecord, which cannot be read in any" in str(
        error.value
    )
    command = f"experiments/prepare.py --name=from_tfrecord --source={old[1]} --data_d"
    assert command in str(error.value)


def test_converted_records_are_the_same(old, rehearsal, tmp_path):
    report = prepare.prepare_from_tfrecord(str(old[1]), str(tmp_path))
    assert f"--config.data.dir={tmp_path}" in report
    builder = tfds.builder("imagenet2012", data_dir=tmp_path)
    assert builder.info.file_format.value == "array_record"
    assert builder.info.features["label"].names[0] == "n01440764"
    for split, count in IMAGES.items():
        before, after = (
            x.as_data_source(split, decoders=SKIP_DECODING)
            for x in (tfds.builder("imagenet2012", data_dir=rehearsal), builder)
        )
        assert len(before) == len(after) == count
        assert [dict(x) for x in before] == [dict(x) for x in after]
    assert len(sources.load(imagenet(tmp_path)).train) == IMAGES["train"]
    with pytest.raises(UserError, match="is there already: remove it to convert again"):
        prepare.prepare_from_tfrecord(str(old[1]), str(tmp_path))


def flipped(contents, place):
    return contents[:place] + bytes([contents[place] ^ 16]) + contents[place + 1 :]


def length_of(contents, start=0):
    """Of a record, with what TFRecord writes around it."""
    return 16 + int.from_bytes(contents[start : start + 8], "little")


SHARDS = {  # what happens to a file, where it is damaged
    "cut": (lambda x: x[:-9], lambda x: len(x) - length_of_last(x)),
    "cut in the second head": (lambda x: x[: length_of(x) + 5], length_of),
    "a bit of a length": (lambda x: flipped(x, 2), lambda x: 0),
    "a bit of its checksum": (lambda x: flipped(x, 9), lambda x: 0),
    "a bit of the first record": (lambda x: flipped(x, 60), lambda x: 0),
    "a bit of the second record": (lambda x: flipped(x, length_of(x) + 60), length_of),
    "a bit of the last checksum": (
        lambda x: flipped(x, len(x) - 1),
        lambda x: len(x) - length_of_last(x),
    ),
    "an endless record": (
        lambda x: (2**62).to_bytes(8, "little") + checksum(bytes(7) + b"@") + x,
        lambda x: 0,
    ),
    "zeros behind": (lambda x: x + bytes(64), len),
}


def length_of_last(contents):
    start = 0
    while start + length_of(contents, start) < len(contents):
        start += length_of(contents, start)
    return length_of(contents, start)


@pytest.mark.parametrize(("damage", "place"), SHARDS.values(), ids=SHARDS)
def test_a_damaged_shard_is_named_with_the_place_and_leaves_nothing(
    damage, place, old, tmp_path
):
    copy = tmp_path / "copy"
    shutil.copytree(old[1], copy)
    shard = next(copy.glob("*-train.tfrecord-*"))
    contents = shard.read_bytes()
    shard.write_bytes(damage(contents))
    with pytest.raises(UserError) as error:
        prepare.prepare_from_tfrecord(str(copy), str(tmp_path / "new"))
    assert str(error.value).startswith(
        f"{shard} is damaged, or cut off, in the record that begins at byte "
        f"{place(contents):,}: copy it again"
    )
    assert not list((tmp_path / "new" / "imagenet2012").iterdir())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: x.unlink(), "is missing: copy"),
        (lambda x: (x.unlink(), os.mkfifo(x)), "is missing: copy"),
        (lambda x: x.write_bytes(b""), "has 0 records, not 60: it"),
        (lambda x: x.write_bytes(2 * x.read_bytes()), "has 120 records, not 60: it"),
    ],
)
def test_a_shard_without_its_records_is_named_and_leaves_nothing(
    change, sentence, old, tmp_path
):
    copy = tmp_path / "copy"
    shutil.copytree(old[1], copy)
    shard = next(copy.glob("*-train.tfrecord-*"))
    change(shard)
    with pytest.raises(UserError) as error:
        prepare.prepare_from_tfrecord(str(copy), str(tmp_path / "new"))
    assert str(error.value).startswith(f"{shard} {sentence}")
    assert not list((tmp_path / "new" / "imagenet2012").iterdir())


DESCRIPTIONS = ["", "{", "[]", "{}", "\0", '{"name": 3}', '{"splits": [{"name": "a"}]}']


@pytest.mark.parametrize("text", DESCRIPTIONS)
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_damaged_description_is_a_sentence(name, text, old, rehearsal, tmp_path):
    shutil.copytree(old[1], tmp_path / "old")
    (tmp_path / "old" / name).write_text(text)
    with pytest.raises(UserError, match="old holds no data set of TFDS: --sou"):
        prepare.prepare_from_tfrecord(str(tmp_path / "old"), str(tmp_path / "new"))
    shutil.copytree(rehearsal, tmp_path / "made")
    (path,) = (tmp_path / "made").glob("imagenet2012/*")
    (path / name).write_text(text)
    with pytest.raises(UserError, match=r"/imagenet2012.* holds no whole data set: "):
        prepare.opened("imagenet2012", str(tmp_path / "made"))


def test_what_is_not_tfrecord_is_not_converted(rehearsal, tmp_path):
    made = list(rehearsal.glob("imagenet2012/*"))
    with pytest.raises(UserError, match="of the format array_record, not tfrecord"):
        prepare.prepare_from_tfrecord(str(made[0]), str(tmp_path))
    with pytest.raises(UserError, match="holds no data set of TFDS"):
        prepare.prepare_from_tfrecord(str(tmp_path), str(tmp_path))
    with pytest.raises(UserError, match=r"from_tfrecord needs --source=\.\.\. and"):
        prepare.prepare_from_tfrecord(None, str(tmp_path))


def command(*arguments, cwd=None):
    """Runs the program; a warning would end it."""
    return subprocess.run(
        [sys.executable, "-W", "error", prepare.__file__, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_program_says_what_is_there_and_what_comes_next(tmp_path):
    data_dir = tmp_path / "a folder"
    name, splits = "--name=imagenet_rehearsal", ("train", "validation", "test")
    sizes = [f"--{x}_images={n}" for x, n in zip(splits, (1200, 3, 2), strict=True)]
    path = data_dir / "imagenet2012" / str(ImagenetRehearsal.VERSION)

    first = command(name, f"--data_dir={data_dir}", *sizes)
    assert (first.returncode, first.stderr) == (0, "")
    there, following = first.stdout.splitlines()
    assert there.startswith(
        "imagenet2012 is prepared: 1,200 train, 3 validation, 2 test images, "
    )
    assert there.endswith(f" MB in {path}")
    assert following == (
        "next: python experiments/train.py --config=experiments/imagenet_st3.py "
        f"--config.data.dir='{data_dir}'"
    )
    again = command(name, f"--data_dir={data_dir}")
    assert again.stdout == first.stdout.replace("is prepared", "was there already")


def test_a_killed_program_leaves_nothing_that_looks_prepared(tmp_path):
    arguments = ["--name=imagenet_rehearsal", f"--data_dir={tmp_path}"]
    program = subprocess.Popen(
        [sys.executable, prepare.__file__, *arguments, "--train_images=1000000"]
    )
    while not list(tmp_path.glob("imagenet2012/incomplete.*")):
        assert program.poll() is None
        time.sleep(0.01)
    program.kill()
    program.wait()
    assert not (tmp_path / "imagenet2012" / str(ImagenetRehearsal.VERSION)).exists()
    assert not tfds.builder("imagenet2012", data_dir=tmp_path).is_prepared()
    report = prepare.prepare_imagenet_rehearsal(str(tmp_path), {"train": 5}, 0)
    assert report.startswith("imagenet2012 is prepared: 5 train images, ")


@pytest.mark.parametrize("name", ["imagenet_rehearsal", "from_tfrecord"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(name, old, tmp_path):
    """A limit on the size of a file stands in for it."""
    program = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"sys.path.insert(0, {str(pathlib.Path(prepare.__file__).parent)!r})\n"
        f"runpy.run_path({prepare.__file__!r}, run_name='__main__')\n"
    )
    arguments = [f"--name={name}", f"--data_dir={tmp_path}", f"--source={old[1]}"]
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: ")
    assert f"write() failed: File too large; writing {tmp_path}" in run.stderr
    assert "Traceback" not in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("imagenet2012/*"))


REHEARSAL = "--name=imagenet_rehearsal"
FASHION_MNIST = "--name=fashion_mnist"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([REHEARSAL], "error: --data_dir is missing: name a folder of its own"),
        ([REHEARSAL, f"--data_dir={__file__}"], "error: [Errno 20] Not a directory"),
        ([FASHION_MNIST, "now"], "error: unknown argument 'now': --help lists the"),
        (
            [FASHION_MNIST, "--data_dir=to", "--source=from"],
            "error: from/train-images-idx3-ubyte.gz is missing: Debian's package",
        ),
        (
            ["--name=mnist"],
            "FATAL Flags parsing error: flag --name=mnist: value should",
        ),
    ],
)
def test_a_wrong_command_ends_in_one_sentence(arguments, sentence, tmp_path):
    run = command(*arguments, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith(sentence)
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())
