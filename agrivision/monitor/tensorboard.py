"""TensorBoard's event files, without holes or doubles however often a run is interrupted.

The files are written here, with TensorBoard's own record format and messages, instead of by torch's
SummaryWriter. That one writes in a background thread, which prints a traceback when the disk is full;
names its files by the clock of the node, so that a job requeued on a node whose clock is behind writes
a file that TensorBoard, which reads files in the order of their names, never opens; and does not fsync.
"""

from __future__ import annotations

import io
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from agrivision.monitor.appended import Appended, close_after
from agrivision.monitor.pictures import Picture, encode
from agrivision.reading import open_plain
from agrivision.storage import detach, replacing, storage_error

TEXT = "/text_summary"  # how the tags of texts end
Again = Callable[[str], bool]

_PREFIX = "events.out.tfevents."
_HEADER = struct.Struct("<QI")  # length of the message, checksum of the length
_FOOTER_BYTES = 4  # checksum of the message
_Goes = Callable[[Any], bool]  # whether an event is to be removed
_NOTHING: Mapping[str, Any] = {}
_NOT_CONTENT = {"file_version", "session_log", None}  # kinds of events that show nothing


class TensorBoard:
    """Writes curves, pictures and texts to an event file in a run's `tensorboard/`.

    What the disk refuses is kept and written later (see `Appended`): a curve has every step once.
    """

    def __init__(
        self,
        folder: Path,
        resume_step: int,
        again: Again = lambda _: False,
        about: Mapping[str, Any] = _NOTHING,
    ) -> None:
        """Remove what an interrupted run wrote after its checkpoint, and open a new event file.

        Args:
            folder: made if it is missing.
            resume_step: last step that the checkpoint holds; 0 for a new run, which removes
                every event that the folder has.
            again: whether what has a tag is written again for that step; it is removed too.
            about: what the folder holds of these tags at step 0, and nowhere else: a Summary with one
                value, or None for nothing. What is there and the same is left alone, so that a run has
                each once over all its interruptions.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        self._first_step = resume_step + 1
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(folder, error) from error
        values = {tag: _value(summary) for tag, summary in about.items()}
        there = _keep(folder, resume_step or -1, again, values).about
        for path in _event_files(folder)[-1:]:
            detach(path)  # an attempt on a node that Slurm has lost may still have it open
        self._file = Appended(_new_file(folder), new=True)
        self._open_events(resume_step)
        for tag, summary in about.items():
            if summary is not None and tag not in there:
                self.add(0, summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        close_after(self._file, error)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each of some curves.

        Args:
            step: optimiser steps done.
            values: by tag, such as `loss/total`, `train/lr`, `score/miou`, `iou/CLASS`.
        """
        entries = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self.add(step, Summary(value=entries))

    def add(self, step: int, summary: Any) -> None:
        """Add what one of TensorBoard's plugins reads: a `Summary`, as from `summaries`."""
        self._add(Event(wall_time=time.time(), step=step, summary=summary))

    def pictures(self, step: int, tag: str, image: Picture) -> None:
        """Add a picture, uint8 of shape (height, width, 3), RGB."""
        height, width, _ = image.shape
        content = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=encode(image)
        )
        self.add(step, Summary(value=[Summary.Value(tag=tag, image=content)]))

    def text(self, tag: str, text: str) -> None:
        """Add a text in Markdown, at the first step of this turn of the run.

        A run that is resumed at the same step again replaces it; at a later one, both are kept.
        """
        plugin = SummaryMetadata.PluginData(plugin_name="text")
        tensor = TensorProto(
            dtype="DT_STRING",
            string_val=[text.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        metadata = SummaryMetadata(plugin_data=plugin)
        value = Summary.Value(tag=f"{tag}{TEXT}", metadata=metadata, tensor=tensor)
        self.add(self._first_step, Summary(value=[value]))

    def flush(self) -> None:
        """Bring everything onto the disk; call it before a checkpoint that counts on these steps.

        Raises:
            StorageError, NotWritable: the disk refused; the next call tries again.
        """
        self._file.flush()

    def close(self) -> None:
        """Flush and close; a second call does nothing.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        self._file.close()

    def _open_events(self, resume_step: int) -> None:
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resume_step:
            # A TensorBoard that is running has read the removed steps already: this makes it forget.
            start = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=self._first_step, session_log=start))

    def _add(self, event: Any) -> None:
        """Append one event, as a whole, so that neither a kill nor a full disk leaves a half."""
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())


def _value(summary: Any) -> Any:
    """The one value of a Summary; None of None."""
    return None if summary is None else summary.value[0]


def _new_file(folder: Path) -> Path:
    """A name that sorts after those that are there, whatever this node's clock says."""
    stamps = [_stamp(path) + 1 for path in _event_files(folder)]
    stamp = max([int(time.time()), *stamps])
    return folder / f"{_PREFIX}{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"


def _event_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*"))


def _stamp(path: Path) -> int:
    """The time in an event file's name, in seconds since 1970; 0 where it has none."""
    match = re.match(r"\d{1,12}(?=\.)", path.name.removeprefix(_PREFIX))
    return int(match[0]) if match else 0


def keep_events(folder: Path, last_step: int, again: Again = lambda _: False) -> int:
    """Remove the events after a step, and records that a kill left torn, from a folder's event files.

    A file that loses nothing is not touched; one with nothing left to show is removed.

    Args:
        folder: event files in its subfolders are left alone.
        last_step: events of later steps go.
        again: of that step's events, those with such a tag go as well.

    Returns:
        How many events went.

    Raises:
        StorageError, NotWritable: the disk refused; the file is then as it was.
    """
    return _keep(folder, last_step, again, _NOTHING).dropped


@dataclass
class _Kept:
    """How many events went, and the tags of those about the run that are there and stay."""

    dropped: int = 0
    about: set[str] = field(default_factory=set)


def _keep(folder: Path, last_step: int, again: Again, about: Mapping[str, Any]) -> _Kept:
    kept = _Kept()

    def goes(event: Any) -> bool:
        if event.WhichOneof("what") == "file_version":
            return False
        values = event.summary.value
        if event.step > last_step or (event.step == last_step and any(again(v.tag) for v in values)):
            return True
        return any(value.tag in about and value != about[value.tag] for value in values)

    for path in _event_files(folder):
        findings = _keep_events_of_file(path, goes)
        kept.dropped += findings.dropped
        kept.about |= findings.tags & about.keys()
    return kept


@dataclass
class _Findings:
    """What one event file holds: events to keep that show something, events to drop, a torn end.

    Attributes:
        content: how many show something.
        dropped: how many are to go.
        tags: of those that stay at step 0.
        torn: whether the file ends in the middle of one.
    """

    content: int = 0
    dropped: int = 0
    tags: set[str] = field(default_factory=set)
    torn: bool = False


def _keep_events_of_file(path: Path, goes: _Goes) -> _Findings:
    try:
        findings = _examine(path, goes)
        if not findings.content:
            path.unlink()
            return findings
    except OSError as error:
        raise storage_error(path, error) from error
    if findings.dropped or findings.torn:
        _rewrite(path, goes)
    return findings


def _examine(path: Path, goes: _Goes) -> _Findings:
    findings, size = _Findings(), 0
    with open_plain(path) as file:
        for event, record in _records(file):
            size += len(record)
            if goes(event):
                findings.dropped += 1
            elif event.WhichOneof("what") not in _NOT_CONTENT:
                findings.content += 1
                if event.step == 0:
                    findings.tags.update(value.tag for value in event.summary.value)
        findings.torn = size != path.stat().st_size
    return findings


def _rewrite(path: Path, goes: _Goes) -> None:
    with path.open("rb") as old, replacing(path) as new:
        for event, record in _records(old):
            if not goes(event):
                new.write(record)


def _records(file: IO[bytes]) -> Iterator[tuple[Any, bytes]]:
    """The events of a file, each with its record as it stands there, up to the first torn one.

    TensorBoard's reader would do, but it computes the checksum of every message in Python: many seconds
    for a folder with pictures. The length is checked by its checksum, the message by being parsed.
    """
    while len(header := file.read(_HEADER.size)) == _HEADER.size:
        length, checksum = _HEADER.unpack(header)
        if masked_crc32c(header[:8]) != checksum:
            return
        body = file.read(length + _FOOTER_BYTES)
        if len(body) != length + _FOOTER_BYTES:
            return
        try:
            event = Event.FromString(body[:length])
        except DecodeError:
            return
        yield event, header + body
