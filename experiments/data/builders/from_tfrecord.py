"""From a data set that TFDS wrote as TFRecord to one that can be read in any order."""

import contextlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import grain
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from rich.progress import Progress

from errors import UserError

__all__ = ["convert"]

OLD, NEW = "tfrecord", "array_record"


def convert(source: pathlib.Path, data_dir: pathlib.Path) -> pathlib.Path:
    """Writes every record again, as it is, in files with random access.

    A kill in between leaves nothing that looks converted.

    Args:
        source: The folder of one version of a data set, with its ``dataset_info.json``.
        data_dir: Where TFDS will look for data sets.

    Returns:
        The folder of the new files.

    Raises:
        UserError: If there are no TFRecord files of TFDS in the source, or fewer
            records than its description says.
    """
    builder = _open(source)
    target = data_dir / builder.info.full_name
    if target.exists():
        raise UserError(f"{target} is there already: remove it to convert again")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = pathlib.Path(tempfile.mkdtemp(prefix="incomplete.", dir=target.parent))
    try:
        _copy_descriptions(source, draft)
        with Progress() as progress:
            shards = list(_shards(builder))
            for shard, records in progress.track(shards, description="shards"):
                _convert_shard(shard, records, draft)
        draft.chmod(0o755)  # a temporary folder is its owner's alone
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _open(source: pathlib.Path) -> Any:
    try:
        builder = tfds.builder_from_directory(source)
    except (OSError, ValueError):
        raise UserError(
            f"{source} holds no data set of TFDS: --source=... is the folder of one "
            "version, with a dataset_info.json, such as .../imagenet2012/5.1.0"
        ) from None
    if builder.info.file_format.value != OLD:
        raise UserError(
            f"{source} holds files of the format {builder.info.file_format.value}, "
            f"not {OLD}: it need not be converted, or cannot be"
        )
    return builder


def _shards(builder: Any) -> Iterator[tuple[pathlib.Path, int]]:
    """Each file and the number of its records."""
    for split in builder.info.splits.values():
        for path, records in zip(split.filepaths, split.shard_lengths, strict=True):
            yield pathlib.Path(path), records


def _convert_shard(shard: pathlib.Path, records: int, folder: pathlib.Path) -> None:
    name = shard.name.replace(f".{OLD}-", f".{NEW}-")
    writer = ArrayRecordWriter(str(folder / name), "group_size:1")
    written = 0
    with contextlib.suppress(ValueError):  # of a record that is cut off
        for record in grain.experimental.TFRecordIterDataset(str(shard)):
            writer.write(record)
            written += 1
    writer.close()
    if written != records:
        raise UserError(
            f"{shard} has {written:,} whole records, not {records:,}: it is damaged, "
            "prepare the data set again"
        )


def _copy_descriptions(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Everything but the records; the new format is named in ``dataset_info.json``."""
    for path in source.iterdir():
        if path.is_file() and f".{OLD}-" not in path.name:
            shutil.copy(path, folder)
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "fileFormat": NEW}, indent=2))
