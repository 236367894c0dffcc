"""What a user reads when the command line, the data or the workdir is wrong."""

import math
import os
import subprocess
import sys

import ml_collections
import pytest
from rich.console import Console
from training import stand_in

import base_config
import cifar10_st3
import digits_st3
import errors
import fashion_mnist_st3
import imagenet_st3
import train
from data import sources
from errors import UserError
from job.settings import settle
from workdir.claim import claim_workdir

TRAIN = [sys.executable, train.__file__]
DIGITS = f"--config={digits_st3.__file__}"

FLAGS = [  # arguments, the one line that ends the run
    (
        [DIGITS, "--config.sparsity.finall=0.9"],
        "error: the configuration has no field 'finall', did you mean 'final'",
    ),
    (
        [DIGITS, "--config.sparsit.final=0.5"],
        "error: the configuration has no field 'sparsit', did you mean 'sparsity'",
    ),
    ([DIGITS, "--config.sparsity.final=high"], "could not convert string to float"),
    (["--config=nowhere.py"], "error: there is no configuration file nowhere.py"),
    (
        [f"--config={errors.__file__}"],
        "error: a configuration file has a function get_config()",
    ),
    ([DIGITS, "extra"], "error: unknown argument 'extra': settings are --config.x=y"),
    ([DIGITS, "--confg.seed=1"], "Unknown command line flag 'confg.seed'"),
    ([], "flag --config=None: Flag --config must have a value other than None"),
    (
        [DIGITS, "--config.sparsity.final=90"],
        "error: config.sparsity: final sparsity is a fraction in [0, 1], got 90.0: for "
        "90 % write 0.9",
    ),
    (
        [DIGITS, "--config.sparsity.method=none", "--config.sparsity.final=90"],
        "error: config.sparsity.final is 90.0, but does nothing while config.sparsity."
        "method is 'none', only where that is 'st3' or",
    ),
]

FIELDS = [  # field, value, the sentence
    ("sparsity.final", -0.1, "final sparsity is a fraction in [0, 1], got -0.1"),
    ("sparsity.final", float("nan"), "final sparsity is a fraction in [0, 1], got nan"),
    (
        "sparsity.method",
        "stt3",
        "config.sparsity.method is one of 'none', 'st3'",
    ),
    ("sparsity.criterion", "l2", "criterion is one of 'l1', 'l1_sigma', got 'l2'"),
    ("sparsity.end_epoch", 1, "end_epoch 1.0 is not after config.sparsity.begin_epo"),
    ("sparsity.begin_epoch", -1, "config.sparsity.begin_epoch is 0 or more, got -1"),
    ("sparsity.end_epoch", 99, "end_epoch is 60 or less, as config.num_epochs is 60"),
    ("sparsity.end_epoch", math.inf, "config.sparsity.end_epoch is below inf, got inf"),
    ("sparsity.layers", (("*", 0.5), ("*", 0.9)), "texts, each once, got ['*', '*']"),
    ("sparsity.layers", ((5, 0.5),), "the paths of layers are texts, each once, got"),
    (
        "sparsity.layers",
        (("*", 0.9), ("stem/*", 0.0)),
        "the path 'stem/*' of sparsity counts for no leaf",
    ),
    ("sparsity.pattern", "1x1", "pattern '1x1' is one weight, so no pattern: write"),
    ("sparsity.power", 0.0, "power is a number above 0, got 0.0"),
    ("sparsity.update_every_steps", 0, "update_every is a number of steps, 1 or more"),
    ("sparsity.distribution", "even", "distribution is one of 'global', 'uniform', "),
    ("sparsity.budget", "energy", "budget is one of 'weights', 'multiply_adds', got"),
    ("sparsity.layers", (("tail*", 0.5),), "'tail*' of sparsity matches no"),
    ("sparsity.layers", ("stem*", 0.5), "layers are pairs of a path and its final"),
    ("sparsity.dense", ("*",), "no parameter is prunable"),
    ("sparsity.dense", ("stem",), "the path 'stem' of dense matches no kernel: there"),
    ("sparsity.dense", ("stem/*", "tail/*"), "the path 'tail/*' of dense matches no k"),
    ("sparsity.dense", ("stem_norm/*",), "'stem_norm/*' of dense matches no kernel"),
    ("sparsity.pattern", "2:4", "pattern '2:4' ends at a sparsity of 0.5, got 0.9"),
    ("sparsity.pattern", "9:4", "'N:M' with 0 < N < M"),
    ("sparsity.pattern", "block", "N:M such as '2:4', or a block such as '4x8', got"),
    ("sparsity.pattern", "5x5", "does not fit"),
    ("sparsity.block_shape", (4, 4), "config.sparsity.block_shape is not a field of"),
    ("model.name", "resnet", "name is one of 'cifar_resnet', 'imagenet_resnet',"),
    ("model.depth", 9, "a CIFAR ResNet has 8, 14, 20, ... layers (6n+2), got 9"),
    ("model.dpeth", 9, "config.model.dpeth is not a field of a configuration"),
    ("model.widen", 9, "config.model: widen is 9, but 'cifar_resnet' has no widen"),
    ("model.depth", None, "config.model: depth is missing, which 'cifar_resnet' needs"),
    ("model.dtype", "float7", "config.model.dtype is one of 'float32', 'bfloat16', "),
    ("model.dtype", "complex64", "config.model.dtype is one of 'float32', 'bfloat16'"),
    ("model.dtype", "float64", "config.model.dtype is one of 'float32', 'bfloat16', "),
    ("model.width", 0, "config.model.width is 1 or more, got 0"),
    ("model.stem_stride", 0, "config.model.stem_stride is 1 or more, got 0"),
    ("model.dropout", 2.0, "config.model.dropout is below 1, got 2.0"),
    ("model.norm_momentum", math.nan, "config.model.norm_momentum is 0 or more, got n"),
    ("model.norm_momentum", 5.0, "config.model.norm_momentum is below 1, got 5.0"),
    ("batch_size", 0, "config.batch_size is 1 or more, got 0"),
    ("batch_size", 65, "config.batch_size 65 cannot be split evenly over 8 devices"),
    ("num_epochs", 0, "config.num_epochs is 1 or more, got 0"),
    ("eval_every_epochs", 0, "config.eval_every_epochs is 1 or more, got 0"),
    ("checkpoint_every_epochs", 0.0, "config.checkpoint_every_epochs is above 0, got"),
    ("accumulate_steps", 0, "config.accumulate_steps is 1 or more, got 0"),
    ("accumulate_steps", 3, "split evenly over 8 devices in 3 accumulated parts: make"),
    ("ema_decay", 1.0, "config.ema_decay is below 1, got 1.0"),
    ("ema_decay", -0.1, "config.ema_decay is 0 or more, got -0.1"),
    ("not_finite", "go", "config.not_finite is one of 'stop', 'skip', got 'go'"),
    ("data.broken_images", "go", "data.broken_images is one of 'stop', 'skip', got"),
    ("defaults.common.data.shift_pixels", -1, "config.data.shift_pixels is 0 or more"),
    ("data.shift_pixels", -1, "config.data.shift_pixels is 0 or more, got -1"),
    ("data.std", (0.0,), "config.data.std is above 0, got (0.0,)"),
    ("data.std", (0.5, 0.5), "have a number for each channel, 1 or 3, got 1 and 2"),
    ("seed", -1, "config.seed is 0 or more, got -1"),
    ("label_smoothing", 1.0, "config.label_smoothing is below 1, got 1.0"),
    ("optimizer.momentum", 1.5, "config.optimizer.momentum is below 1, got 1.5"),
    ("optimizer.weight_decay", -1.0, "config.optimizer.weight_decay is 0 or more, go"),
    ("optimizer.clip_norm", 0.0, "config.optimizer.clip_norm is above 0, got 0.0"),
    ("learning_rate.peak", math.nan, "config.learning_rate.peak is 0 or more, got nan"),
    ("checkpoint_every_epochs", math.inf, "checkpoint_every_epochs is below inf, got"),
    ("learning_rate.peak", math.inf, "config.learning_rate.peak is below inf, got inf"),
    ("learning_rate.warmup_epochs", 60, "warmup_epochs is 59 or less, as config.num_e"),
    ("data.mean", ("a",), "config.data.mean is made of numbers, got ('a',)"),
    ("data.mean", (math.inf,), "config.data.mean is made of numbers, got (inf,)"),
    ("data.std", (None,), "config.data.std is made of numbers, got (None,)"),
    ("num_epochs", 10**8, "config.num_epochs is below 1000000, got 100000000"),
    ("defaults.st3", 3, "config.defaults.st3 has fields and their values, got 3"),
    (
        "data.augmentation",
        "resized_crop",
        "config.data.in_memory keeps images as large",
    ),
    ("learning_rate.schedule", "linear", "is one of 'step', 'cosine', got 'linear'"),
    ("data.augmentation", "all", "config.data.augmentation is one of 'none', 'shift'"),
    ("sparsety.final", 0.9, "config.sparsety is not a field of a configuration"),
]

DATA = [
    (
        "data.name",
        "digitz",
        "config.data.name is 'digits', 'folder' or a data set of TFDS, got",
    ),
    (
        "batch_size",
        4000,
        "config.batch_size 4000 is more than the 1,438 training images",
    ),
    ("data.mean", (0.5, 0.5, 0.5), "config.data.mean has 3 numbers, but the images of"),
]


def changed(field, value):
    config = digits_st3.get_config().unlock()
    *path, name = field.split(".")
    node = config
    for part in path:
        if part not in node:
            node[part] = ml_collections.ConfigDict()
        node = node[part]
    node[name] = value
    return config


@pytest.mark.parametrize(("arguments", "sentence"), FLAGS)
def test_a_wrong_command_ends_in_one_line(arguments, sentence, tmp_path, data_dir):
    run = subprocess.run(
        [*TRAIN, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TFDS_DATA_DIR": data_dir},
    )
    assert run.returncode != 0
    assert sentence in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Where the data set is prepared."""
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def digits(data_dir):
    """The images, which are decoded once."""
    return sources.load(changed("data.dir", data_dir))


@pytest.mark.parametrize(("field", "value", "sentence"), FIELDS)
def test_a_wrong_field_is_named_and_leaves_nothing(
    field, value, sentence, tmp_path, digits, monkeypatch
):
    monkeypatch.setattr(sources, "load", lambda config: digits)
    with pytest.raises(UserError) as error:
        train.train_and_evaluate(changed(field, value), tmp_path / "run")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("field", "value", "sentence"), DATA)
def test_settings_that_do_not_fit_the_data_are_named(field, value, sentence, tmp_path):
    config = changed(field, value)
    config.data.dir = str(tmp_path)
    with pytest.raises(UserError) as error:
        sources.load(config)
    assert sentence in str(error.value)


def test_a_folder_without_images_to_test_on_is_named(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
    for i in range(64):
        (tmp_path / "train" / "a" / f"{i}.png").write_bytes(b"")
    config = changed("data.name", "folder")
    config.data.update(dir=str(tmp_path), in_memory=False)
    with pytest.raises(UserError, match="'test' of 'folder' has no image: name a"):
        sources.load(settle(config).config)


def test_the_workdir_may_be_text(tmp_path):
    config = changed("data.dir", str(tmp_path))
    claim_workdir(tmp_path / "run", settle(config).config)
    config.sparsity.final = 0.95
    with pytest.raises(UserError, match=r"sparsity\.final = 0\.9 there, 0\.95 here"):
        train.train_and_evaluate(config, str(tmp_path / "run"))


def test_a_missing_field_is_named():
    config = digits_st3.get_config()
    del config.seed
    with pytest.raises(UserError, match=r"config\.seed is missing: start from base_c"):
        settle(config)


def test_data_that_is_not_prepared_comes_with_the_command_that_prepares_it(tmp_path):
    config = cifar10_st3.get_config()
    config.data.dir = str(tmp_path)
    with pytest.raises(UserError) as error:
        train.train_and_evaluate(config, tmp_path / "workdir")
    assert "'cifar10' is not prepared in" in str(error.value)
    command = f"tfds.builder('cifar10', data_dir='{tmp_path}', file_format='array_reco"
    assert "python -m venv tf && tf/bin/pip install tensorflow-cpu" in str(error.value)
    assert command in str(error.value)
    assert not (tmp_path / "workdir").exists()


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (
            fashion_mnist_st3,
            "once with python experiments/prepare.py --name=fashion_",
        ),
        (imagenet_st3, "or prepare it once, as docs/imagenet.md says"),
    ],
)
def test_data_that_has_a_way_of_its_own_is_told_that(module, sentence, tmp_path):
    config = module.get_config()
    config.data.dir = str(tmp_path)
    with pytest.raises(UserError) as error:
        sources.load(config)
    assert sentence in str(error.value)


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = changed("data.dir", str(tmp_path))
    with pytest.raises(UserError, match=r"file/run cannot be written to \(Not a dir"):
        train.train_and_evaluate(config, tmp_path / "file" / "run")


def test_a_workdir_with_other_settings_is_not_touched(tmp_path):
    config = changed("data.dir", str(tmp_path))
    claim_workdir(tmp_path / "run", settle(config).config)
    config.sparsity.final = 0.95
    with pytest.raises(UserError, match=r"sparsity\.final = 0\.9 there, 0\.95 here"):
        train.train_and_evaluate(config, tmp_path / "run")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    small, large = changed("model.width", 2), changed("model.width", 3)
    jobs = [stand_in(config) for config in (small, large)]
    states = [train.create_train_state(job.config, job.model, job.tx) for job in jobs]
    with train.checkpoints.open_checkpoints(tmp_path / "run") as manager:
        train.checkpoints.save(manager, 1, states[0])
        manager.wait_until_finished()
        with pytest.raises(UserError, match=r"of another model or optimizer: .* is "):
            train.checkpoints.restore(manager, states[1], Console())


def test_every_field_of_the_configuration_is_in_its_table():
    config = ml_collections.ConfigDict(base_config.get_config())
    assert {"seed", "data", "model", "sparsity"} <= set(config)
