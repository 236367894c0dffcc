"""From a data set that TFDS wrote as TFRecord to one that can be read in any order."""

import json
import os
import pathlib
import shutil
import struct
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import google_crc32c
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
        UserError: If there are no TFRecord files of TFDS in the source, or if one is
            damaged, or has not the records that its description says.
    """
    builder, shards = _open(source)
    target = data_dir / builder.info.full_name
    if target.exists():
        raise UserError(f"{target} is there already: remove it to convert again")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = pathlib.Path(tempfile.mkdtemp(prefix="incomplete.", dir=target.parent))
    try:
        _copy_descriptions(source, draft)
        with Progress() as progress:
            for shard, records in progress.track(shards, description="shards"):
                _convert_shard(shard, records, draft)
        draft.chmod(0o755)  # a temporary folder is its owner's alone
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _open(source: pathlib.Path) -> tuple[Any, list[tuple[pathlib.Path, int]]]:
    """The builder; each file and the number of its records."""
    try:
        builder = tfds.builder_from_directory(source)
        shards = list(_shards(builder))
    except Exception:  # damaged descriptions make TFDS raise anything
        raise UserError(
            f"{source} holds no data set of TFDS: --source=... is the folder of one "
            "version, with a dataset_info.json, such as .../imagenet2012/5.1.0"
        ) from None
    if builder.info.file_format.value != OLD:
        raise UserError(
            f"{source} holds files of the format {builder.info.file_format.value}, "
            f"not {OLD}: it need not be converted, or cannot be"
        )
    return builder, shards


def _shards(builder: Any) -> Iterator[tuple[pathlib.Path, int]]:
    for split in builder.info.splits.values():
        for path, records in zip(split.filepaths, split.shard_lengths, strict=True):
            yield pathlib.Path(path), records


def _convert_shard(shard: pathlib.Path, records: int, folder: pathlib.Path) -> None:
    name = shard.name.replace(f".{OLD}-", f".{NEW}-")
    writer = ArrayRecordWriter(str(folder / name), "group_size:1")
    try:
        if not shard.is_file():  # to open a FIFO would wait
            raise UserError(f"{shard} is missing: copy the data set again")
        with shard.open("rb") as file:
            written = sum(_copied(record, writer) for record in _records(file))
    finally:
        writer.close()
    if written != records:
        raise UserError(
            f"{shard} has {written:,} records, not {records:,}: it is damaged, prepare "
            "the data set again"
        )


def _copied(record: bytes, writer: Any) -> bool:
    writer.write(record)
    return True


def _records(file: BinaryIO) -> Iterator[bytes]:
    """The records of a TFRecord file: length, its checksum, record, its checksum.

    Raises:
        UserError: At the first one that is not whole.
    """
    size = os.fstat(file.fileno()).st_size
    while (start := file.tell()) < size:
        head = file.read(12).ljust(12, b"\0")
        (length,) = struct.unpack("<Q", head[:8])
        if _checksum(head[:8]) != head[8:] or start + length + 16 > size:
            raise _damaged(file, start)
        record = file.read(length)
        if _checksum(record) != file.read(4):
            raise _damaged(file, start)
        yield record


def _checksum(content: bytes) -> bytes:
    """TFRecord's masked CRC-32C."""
    crc = google_crc32c.value(content)
    rotated = (crc >> 15 | crc << 17) + 0xA282EAD8
    return (rotated & 0xFFFFFFFF).to_bytes(4, "little")


def _damaged(file: BinaryIO, start: int) -> UserError:
    return UserError(
        f"{file.name} is damaged, or cut off, in the record that begins at byte "
        f"{start:,}: copy it again, or prepare the data set again"
    )


def _copy_descriptions(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Everything but the records; the new format is named in ``dataset_info.json``."""
    for path in source.iterdir():
        if path.is_file() and f".{OLD}-" not in path.name:
            shutil.copy(path, folder)
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "fileFormat": NEW}, indent=2))
