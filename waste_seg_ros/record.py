"""``waste-seg record``: the graph's topics into MCAP files, and the reading of such files.

What is written is a bag as rosbag2 of Jazzy writes it (``ros2 bag play``, ``ros2 bag info`` and
Foxglove read it): a folder with MCAP files of profile ``ros2``, messages in CDR as they came over
DDS, schemas ``ros2msg`` with all that they refer to, and ``metadata.yaml`` of version 9. Messages
are neither decoded nor encoded on the way, and to read them takes no package of ROS.

Once a second all that has come is written out as a chunk of its own. A recorder that is killed
thus leaves a file that lacks its end and at most that second: `Bag` reads it, and ``waste-seg
replay --repair`` makes a whole one of it for others.

MCAP: https://mcap.dev/spec, https://mcap.dev/spec/registry#ros2
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import os
import queue
import re
import signal
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml
import zstandard
from mcap.exceptions import McapError
from mcap.reader import SeekingReader
from mcap.records import Channel, Chunk, Message, Schema
from mcap.stream_reader import StreamReader, breakup_chunk
from mcap.summary import Summary
from mcap.writer import CompressionType, Writer

from waste_seg_ros.files import write_file

METADATA = "metadata.yaml"
SUFFIX = ".mcap"
COMPRESSIONS = {
    "lz4": CompressionType.LZ4,
    "zstd": CompressionType.ZSTD,
    "none": CompressionType.NONE,
}
CHUNK = 4 << 20
"""Bytes after which a chunk is closed; a second closes it, too."""
WAITING = 256 << 20
"""Bytes that may wait for the disk; messages that come then are dropped, and counted."""
TOPICS = (
    "camera_info",
    "depth/*",
    "items",
    "mask",
    "instances",
    "tracks",
    "picks",
    "arms/state",
    "belt/speed",
    "truth/*",
    "/diagnostics",
    "/tf",
    "/tf_static",
)
"""Recorded beside the image, as far as they are there; relative to the namespace."""
IMAGES = ("auto", "raw", "compressed", "both", "none")

_MAGIC = b"\x89MCAP0\r\n"
_UNREADABLE = (
    McapError,
    zstandard.ZstdError,
    struct.error,
    ValueError,
    RuntimeError,  # lz4
    EOFError,
    LookupError,
    MemoryError,  # a length that is none
    OverflowError,
)
"""What the reader of a damaged file raises."""


class RecordingError(ValueError):
    """A recording cannot be written or read; the text names file and topic, and the mend."""


# --- message definitions --------------------------------------------------------------------------

_TYPE = re.compile(r"(\w+)/(?:msg/)?(\w+)")
_FIELD = re.compile(r"^\s*([\w/]+)(?:<=\d+)?(?:\[[^\]]*\])?\s+\w+", re.MULTILINE)
_PRIMITIVE = re.compile(r"bool|byte|char|w?string|float(32|64)|u?int(8|16|32|64)")


def message_definition(type_name: str) -> str:
    """Return a message's definition followed by those of all that it refers to, as MCAP wants it.

    Args:
        type_name: such as ``sensor_msgs/msg/Image``.

    Raises:
        RecordingError: a definition is not installed.
    """
    seen = {_short(type_name)}

    def text_of(name: str) -> str:
        package, _, message = name.partition("/")
        text = _definition_file(package, message).read_text()
        for used in _FIELD.findall(re.sub(r"#.*", "", text)):
            if _PRIMITIVE.fullmatch(used):
                continue
            # "Header" alone is the one name that stands for another package's.
            used = "std_msgs/Header" if used == "Header" else used
            used = used if "/" in used else f"{package}/{used}"
            if used not in seen:
                seen.add(used)
                text += f"\n{'=' * 80}\nMSG: {used}\n{text_of(used)}"
        return text

    return text_of(_short(type_name))


def _short(type_name: str) -> str:
    match = _TYPE.fullmatch(type_name)
    if match is None:
        raise RecordingError(f"'{type_name}' is no type of message")
    return f"{match[1]}/{match[2]}"


def _definition_file(package: str, message: str) -> Path:
    for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep):
        file = Path(prefix) / "share" / package / "msg" / f"{message}.msg"
        if prefix and file.is_file():
            return file
    raise RecordingError(
        f"{package}/msg/{message}.msg is not installed: source the workspace that has {package}"
    )


def message_class(type_name: str) -> Any:
    """Return the Python class of a message.

    Raises:
        RecordingError: its package is not installed.
    """
    package, _, name = _short(type_name).partition("/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), name)
    except (ImportError, AttributeError) as error:
        raise RecordingError(
            f"{type_name} is not installed: source the workspace that has {package}"
        ) from error


# --- writing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Topic:
    """A topic of a bag.

    Attributes:
        name: absolute.
        type: such as ``sensor_msgs/msg/Image``.
        definition: see `message_definition`.
        qos: what its publishers offered, as rosbag2 writes it.
        type_hash: REP 2016, such as ``RIHS01_...``; "" where it is not known.
    """

    name: str
    type: str
    definition: str
    qos: tuple[Mapping[str, Any], ...] = ()
    type_hash: str = ""


@dataclass
class _File:
    """What a bag's metadata says of one of its files; times in ns since the epoch."""

    path: Path
    counts: Counter[str] = field(default_factory=Counter)
    first: int = 0
    last: int = 0


class BagWriter:
    """A bag being written; to be closed, and used by one thread at a time."""

    def __init__(
        self, folder: Path, *, compression: str = "lz4", split_bytes: int = 0, keep: int = 0
    ) -> None:
        """Make the bag's folder and first file.

        Args:
            folder: made; it must not be there.
            compression: one of `COMPRESSIONS`.
            split_bytes: size after which the next file is begun; 0: one file.
            keep: only so many of the newest files are kept; 0: all.

        Raises:
            RecordingError: the folder is there.
            OSError: it cannot be made.
        """
        self.folder = folder
        self.topics: dict[str, Topic] = {}
        self.dropped_files = 0
        self._compression = COMPRESSIONS[compression]
        self._split_bytes, self._keep = split_bytes, keep
        self._files: list[_File] = []
        self._number = 0
        self._broken = False
        self._channels: dict[str, int] = {}
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise RecordingError(
                f"{folder} is there already: give another name with --output, or remove it"
            ) from None
        self._begin()

    def _begin(self) -> None:
        path = self.folder / f"{self.folder.name}_{self._number}{SUFFIX}"
        self._number += 1
        self._stream: IO[bytes] = path.open("xb")
        self._writer = Writer(self._stream, CHUNK, self._compression)
        self._writer.start("ros2", "waste_seg_ros")
        self._files.append(_File(path))
        self._channels.clear()

    def add_topic(self, topic: Topic) -> None:
        """Make a topic known before its first message."""
        self.topics[topic.name] = topic

    def write(self, name: str, data: bytes, log_time: int, publish_time: int) -> None:
        """Write a message.

        Args:
            name: of a topic that has been added.
            data: the message in CDR with its four bytes of header.
            log_time: when it came [ns since the epoch].
            publish_time: when it was sent.

        Raises:
            OSError: the disk is full or gone.
        """
        with self._breakable():
            if self._split_bytes and self._stream.tell() >= self._split_bytes:
                self._end()
                self._begin()
            if name not in self._channels:
                self._channels[name] = self._channel(self.topics[name])
            self._writer.add_message(self._channels[name], log_time, data, publish_time)
        file = self._files[-1]
        file.first = min(file.first, log_time) if file.counts else log_time
        file.last = max(file.last, log_time)
        file.counts[name] += 1

    def _channel(self, topic: Topic) -> int:
        # Schemas are few and small; one for each channel spares to look for an equal one.
        schema = self._writer.register_schema(topic.type, "ros2msg", topic.definition.encode())
        qos = yaml.safe_dump([dict(profile) for profile in topic.qos], sort_keys=False)
        metadata = {"offered_qos_profiles": qos, "topic_type_hash": topic.type_hash}
        return self._writer.register_channel(topic.name, "cdr", schema, metadata)

    def flush(self) -> None:
        """Write out what has come so far, so that it is there whatever becomes of this process.

        Raises OSError.
        """
        with self._breakable():
            self._writer.flush()

    @contextlib.contextmanager
    def _breakable(self) -> Iterator[None]:
        """A chunk may be written in part; what would come behind it could not be read."""
        try:
            yield
        except OSError:
            self._broken = True
            raise

    @property
    def counts(self) -> Counter[str]:
        """Messages by topic in the files that are kept."""
        return sum((file.counts for file in self._files), Counter())

    @property
    def size(self) -> int:
        """Of the files [bytes]."""
        with contextlib.suppress(OSError):
            return sum(file.path.stat().st_size for file in self._files)
        return 0

    def _end(self) -> None:
        information = yaml.safe_dump(self._metadata(), sort_keys=False)
        self._writer.flush()
        self._writer.add_metadata("rosbag2", {"serialized_metadata": information})
        self._writer.finish()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        while self._keep and len(self._files) > self._keep:
            self._files.pop(0).path.unlink(missing_ok=True)
            self.dropped_files += 1
        whole = {"rosbag2_bagfile_information": self._metadata()}
        write_file(self.folder / METADATA, yaml.safe_dump(whole, sort_keys=False).encode())

    def close(self) -> None:
        """End the file and write the bag's metadata; leave it as it is where writing failed.

        Raises OSError.
        """
        if self._stream.closed:
            return
        try:
            if not self._broken:
                self._end()
        finally:
            with contextlib.suppress(OSError):
                self._stream.close()

    def _metadata(self) -> dict[str, Any]:
        """As rosbag2_storage's yaml.hpp encodes it (version 9)."""
        counts = self.counts
        filled = [file for file in self._files if file.counts]
        first = min((file.first for file in filled), default=0)
        last = max((file.last for file in filled), default=0)
        return {
            "version": 9,
            "storage_identifier": "mcap",
            "duration": {"nanoseconds": last - first},
            "starting_time": {"nanoseconds_since_epoch": first},
            "message_count": counts.total(),
            "topics_with_message_count": [
                {
                    "topic_metadata": {
                        "name": topic.name,
                        "type": topic.type,
                        "serialization_format": "cdr",
                        "offered_qos_profiles": [dict(profile) for profile in topic.qos],
                        "type_description_hash": topic.type_hash,
                    },
                    "message_count": counts[topic.name],
                }
                for topic in self.topics.values()
            ],
            "compression_format": "",
            "compression_mode": "",
            "relative_file_paths": [file.path.name for file in self._files],
            "files": [
                {
                    "path": file.path.name,
                    "starting_time": {"nanoseconds_since_epoch": file.first},
                    "duration": {"nanoseconds": file.last - file.first},
                    "message_count": file.counts.total(),
                }
                for file in self._files
            ],
            "custom_data": {},
            "ros_distro": os.environ.get("ROS_DISTRO", ""),
        }


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A message of a bag as it lies there; times in ns since the epoch."""

    topic: str
    data: bytes
    log_time: int
    publish_time: int


class Bag:
    """A recording to be read: an MCAP file, or a folder of them.

    Attributes:
        topics: by name.
        counts: messages by topic.
        problems: what is wrong with files of which something can be read.
        first, last: the least and the greatest time of a message [ns since the epoch].
    """

    def __init__(self, path: Path) -> None:
        """Look a recording over.

        Raises:
            RecordingError: it is not there, is no MCAP, or nothing of it can be read.
        """
        self.path = path
        self.topics: dict[str, Topic] = {}
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.first, self.last = 0, 0
        self._files = {file: False for file in _files(path)}  # whether a file has its index
        for file in self._files:
            self._look_over(file)
        if not self.counts:
            text = "; ".join(self.problems) or f"{path} holds no messages"
            raise RecordingError(text)

    def _look_over(self, file: Path) -> None:
        try:
            stream = file.open("rb")
        except OSError as error:
            raise RecordingError(f"{file} cannot be read: {error.strerror}") from error
        with stream:
            magic = stream.read(len(_MAGIC))
            if magic != _MAGIC:
                what = "is empty" if not magic else "is not an MCAP file"
                raise RecordingError(
                    f"{file} {what}; give a .mcap file or a folder of `waste-seg record` or "
                    "`ros2 bag record -s mcap`"
                )
            summary = _summary(stream)
            if summary is not None and summary.statistics is not None and summary.chunk_indexes:
                self._files[file] = True
                figures = summary.statistics
                for channel in summary.channels.values():
                    self._add(channel, summary.schemas.get(channel.schema_id))
                    count = figures.channel_message_counts.get(channel.id, 0)
                    self.counts[channel.topic] += count
                if figures.message_count:
                    self._extend(figures.message_start_time)
                    self._extend(figures.message_end_time)
                return
            read = 0
            problems: list[str] = []
            for schema, channel, message in _along(stream, file, problems):
                self._add(channel, schema)
                self._extend(message.log_time)
                self.counts[channel.topic] += 1
                read += 1
            if problems:
                self.problems.append(f"{'; '.join(problems)}; {read} messages can be read")

    def _add(self, channel: Channel, schema: Schema | None) -> None:
        if channel.topic in self.topics:
            return
        named, text = "" if schema is None else schema.name, ""
        if schema and (schema.encoding, channel.message_encoding) == ("ros2msg", "cdr"):
            text = schema.data.decode(errors="replace")
        metadata = channel.metadata
        self.topics[channel.topic] = Topic(
            channel.topic,
            named,
            text,
            _offered(metadata.get("offered_qos_profiles", "")),
            metadata.get("topic_type_hash", ""),
        )

    def _extend(self, at: int) -> None:
        known = self.last > 0
        self.first = min(self.first, at) if known else at
        self.last = max(self.last, at) if known else at

    def entries(self, topics: Collection[str] | None = None) -> Iterator[Entry]:
        """Yield the messages, in the order of time where files are whole.

        Raises:
            RecordingError: a part of a file is damaged.
        """
        for file, whole in self._files.items():
            with file.open("rb") as stream:
                if not whole:  # what is wrong with it is known
                    for _, channel, message in _along(stream, file, []):
                        if topics is None or channel.topic in topics:
                            yield _entry(channel, message)
                    continue
                try:
                    reader = SeekingReader(stream, validate_crcs=True)
                    for _, channel, message in reader.iter_messages(topics):
                        yield _entry(channel, message)
                except _UNREADABLE as error:
                    raise RecordingError(
                        f"{file} is damaged ({error}): `waste-seg replay {self.path} --repair "
                        "FOLDER` saves the rest"
                    ) from error

    def salvage(self) -> Iterator[Entry]:
        """Yield all that can be read, over whatever is damaged; `problems` says what was."""
        self.problems = []
        for file in self._files:
            with file.open("rb") as stream:
                for _, channel, message in _along(stream, file, self.problems):
                    yield _entry(channel, message)

    def decoder(self, topic: str) -> Callable[[bytes], Any]:
        """Return what makes an object with the message's fields of its bytes; needs no ROS.

        Raises:
            RecordingError: the topic's messages are not described as those of ROS 2 are.
        """
        from mcap_ros2.decoder import DecoderFactory

        known = self.topics[topic]
        schema = Schema(1, known.definition.encode(), "ros2msg", known.type)
        try:
            found = DecoderFactory().decoder_for("cdr", schema) if known.definition else None
        except Exception as error:  # the parser's errors are of many types
            raise RecordingError(f"{self.path}: {topic}: bad definition ({error})") from error
        if found is None:
            raise RecordingError(
                f"{self.path}: {topic} is not in CDR with a definition in ros2msg: record it anew "
                "with `waste-seg record` or `ros2 bag record -s mcap`"
            )

        def decode(data: bytes) -> Any:
            try:
                return found(data)
            except Exception as error:  # of whatever the bytes lead the decoder to
                raise RecordingError(
                    f"{self.path}: {topic}: a message does not fit its definition ({error})"
                ) from error

        return decode

    def listing(self) -> str:
        """Topics, types and counts for a terminal."""
        width = max(map(len, self.topics))
        lines = [
            f"{name:{width}s}  {self.counts[name]:6d}  {topic.type}"
            for name, topic in sorted(self.topics.items())
        ]
        seconds = (self.last - self.first) * 1e-9
        return "\n".join((f"{self.path}: {self.counts.total()} messages, {seconds:.1f} s", *lines))


def _files(path: Path) -> list[Path]:
    """The MCAP files of a recording in their order."""
    if not path.is_dir():
        if path.name == METADATA:
            return _files(path.parent)
        if not path.exists():
            raise RecordingError(f"there is no {path}")
        return [path]
    with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError):
        whole = yaml.safe_load((path / METADATA).read_text())
        names = whole["rosbag2_bagfile_information"]["relative_file_paths"]
        files = [path / Path(name).name for name in names]
        if files and all(file.is_file() for file in files):
            return files
    # No metadata, as after a kill: by number.
    found = sorted(path.glob(f"*{SUFFIX}"), key=_number)
    if not found:
        held = sorted(entry.name for entry in path.iterdir())[:8]
        raise RecordingError(
            f"{path} holds no {SUFFIX} file ({', '.join(held) or 'it is empty'}); bags in sqlite3: "
            "ros2 bag convert"
        )
    return found


def _number(file: Path) -> tuple[int, str]:
    digits = re.search(r"_(\d+)$", file.stem)
    return (int(digits[1]) if digits else -1, file.name)


def _summary(stream: IO[bytes]) -> Summary | None:
    """The index at a file's end, None where it is not there or broken."""
    stream.seek(0)
    try:
        return SeekingReader(stream).get_summary()
    except (*_UNREADABLE, OSError):
        return None


def _along(
    stream: IO[bytes], file: Path, problems: list[str]
) -> Iterator[tuple[Schema | None, Channel, Message]]:
    """Read a file from its begin to where it ends or breaks, over damaged chunks."""
    stream.seek(0)
    schemas: dict[int, Schema] = {}
    channels: dict[int, Channel] = {}
    damaged = 0
    broken = False  # the chunk before
    size = os.fstat(stream.fileno()).st_size
    records = StreamReader(stream, emit_chunks=True, record_size_limit=size).records
    while True:
        try:
            record = next(records, None)
        except _UNREADABLE:
            damaged -= broken  # that was the end
            problems.append(f"{file} is cut short or damaged at {stream.tell()} of {size} bytes")
            break
        if record is None:
            break
        broken = False
        try:
            inner = breakup_chunk(record, True) if isinstance(record, Chunk) else [record]
        except _UNREADABLE:
            damaged += 1
            broken = True
            continue
        for part in inner:
            if isinstance(part, Schema):
                schemas[part.id] = part
            elif isinstance(part, Channel):
                channels[part.id] = part
            elif isinstance(part, Message) and part.channel_id in channels:
                channel = channels[part.channel_id]
                yield schemas.get(channel.schema_id), channel, part
    if damaged:
        problems.append(f"{file}: {damaged} chunks are damaged and left out")


def _entry(channel: Channel, message: Message) -> Entry:
    return Entry(channel.topic, message.data, message.log_time, message.publish_time)


def _offered(text: str) -> tuple[Mapping[str, Any], ...]:
    with contextlib.suppress(yaml.YAMLError):
        read = yaml.safe_load(text)
        if isinstance(read, list):
            return tuple(profile for profile in read if isinstance(profile, dict))
    return ()


# --- QoS ------------------------------------------------------------------------------------------


def qos_record(profile: Any) -> dict[str, Any]:
    """An rclpy QoSProfile as rosbag2 writes it."""

    def duration(value: Any) -> dict[str, int]:
        # None given means for ever.
        nanoseconds = value.nanoseconds or 2**63 - 1
        return {"sec": nanoseconds // 10**9, "nsec": nanoseconds % 10**9}

    return {
        "history": profile.history.short_key,
        "depth": profile.depth,
        "reliability": profile.reliability.short_key,
        "durability": profile.durability.short_key,
        "deadline": duration(profile.deadline),
        "lifespan": duration(profile.lifespan),
        "liveliness": profile.liveliness.short_key,
        "liveliness_lease_duration": duration(profile.liveliness_lease_duration),
        "avoid_ros_namespace_conventions": profile.avoid_ros_namespace_conventions,
    }


def offered_qos(topic: Topic, depth: int = 10) -> Any:
    """The rclpy QoSProfile with which to publish what was recorded.

    Of several publishers the strongest offer counts, which serves all who heard any of them.
    """
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

    def any_offers(policy: str, name: str, number: int) -> bool:
        # Names since metadata version 9, before it the numbers of rmw.
        return any(profile.get(policy) in (name, number) for profile in topic.qos)

    reliable = any_offers("reliability", "reliable", 1) or not topic.qos
    local = any_offers("durability", "transient_local", 1)
    depths = [profile.get("depth", 0) for profile in topic.qos]
    return QoSProfile(
        depth=max([depth, *(d for d in depths if isinstance(d, int) and d < 10_000)]),
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if local else DurabilityPolicy.VOLATILE,
    )


def _requested_qos(publishers: Sequence[Any], depth: int) -> Any:
    """What all of the publishers can give, and no less."""
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

    offers = [publisher.qos_profile for publisher in publishers]
    reliable = all(offer.reliability == ReliabilityPolicy.RELIABLE for offer in offers)
    local = all(offer.durability == DurabilityPolicy.TRANSIENT_LOCAL for offer in offers)
    return QoSProfile(
        depth=depth,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if local else DurabilityPolicy.VOLATILE,
    )


# --- recording ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """Which topics to record.

    Attributes:
        patterns: absolute names; ``*`` stands for anything.
        image: absolute name of the raw image.
        images: one of `IMAGES`; auto takes the raw image, or the compressed one where that is all.
    """

    patterns: tuple[str, ...]
    image: str
    images: str

    def takes(self, name: str, there: Collection[str]) -> bool:
        """Whether to record a topic, when so many are there."""
        compressed = f"{self.image}/compressed"
        if name == self.image:
            return self.images in ("auto", "raw", "both")
        if name == compressed:
            wanted = self.images in ("compressed", "both")
            return wanted or (self.images == "auto" and self.image not in there)
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)


class Recorder:
    """Subscribes to what is there and comes later, and hands it to a thread that writes."""

    def __init__(self, node: Any, bag: BagWriter, selection: Selection) -> None:
        self.dropped: Counter[str] = Counter()
        """Messages that the disk was too slow for."""
        self.problem: OSError | None = None
        """What keeps the bag from being written."""
        self._node, self._bag, self._selection = node, bag, selection
        self._subscriptions: dict[str, Any] = {}
        self._refused: set[str] = set()
        self._patience: Counter[str] = Counter()
        self._queue: queue.SimpleQueue[tuple[str, bytes, int, int] | Topic | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()
        self._waiting = 0
        self.count = 0
        self._writer = threading.Thread(target=self._write, name="writer")
        self._writer.start()
        self._timer = node.create_timer(0.2, self._look)

    def close(self) -> None:
        """Write what waits, and end the bag; `problem` says if that failed."""
        self._node.destroy_timer(self._timer)
        for subscription in self._subscriptions.values():
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()
        self._queue.put(None)
        self._writer.join()
        try:
            self._bag.close()
        except OSError as error:
            self.problem = self.problem or error

    # --- executor's thread ---

    def _look(self) -> None:
        """Subscribe to what is new, and anew where publishers have come that offer less."""
        there = {
            name: kinds
            for name, kinds in self._node.get_topic_names_and_types()
            if self._node.count_publishers(name)
        }
        for name, kinds in there.items():
            if name in self._refused or not self._selection.takes(name, there):
                continue
            publishers = self._node.get_publishers_info_by_topic(name)
            if not publishers:
                continue
            # The raw image beside a compressed one is heard of at about the same time.
            self._patience[name] += 1
            compressed = name == f"{self._selection.image}/compressed"
            if compressed and self._selection.images == "auto" and self._patience[name] < 4:
                continue
            depth = 20 if kinds[0].endswith("Image") else 200
            qos = _requested_qos(publishers, depth)
            held = self._subscriptions.get(name)
            if held is not None:
                before = held.qos_profile
                if (before.reliability, before.durability) == (qos.reliability, qos.durability):
                    continue
                self._node.destroy_subscription(held)
            self._subscribe(name, kinds, publishers, qos)

    def _subscribe(
        self, name: str, kinds: Sequence[str], publishers: Sequence[Any], qos: Any
    ) -> None:
        try:
            if len(kinds) > 1:
                raise RecordingError(f"it is published as {' and '.join(kinds)}")
            kind = message_class(kinds[0])
            topic = Topic(
                name,
                kinds[0],
                message_definition(kinds[0]),
                tuple(qos_record(publisher.qos_profile) for publisher in publishers),
                str(publishers[0].topic_type_hash),
            )
        except RecordingError as error:
            self._refused.add(name)
            print(f"{name} is not recorded: {error}", file=sys.stderr, flush=True)
            return
        if name not in self._subscriptions:
            print(f"recording {name} ({kinds[0]})", flush=True)
            self._queue.put(topic)

        def take(data: bytes, info: Mapping[str, int]) -> None:
            self._take(name, data, info)

        self._subscriptions[name] = self._node.create_subscription(kind, name, take, qos, raw=True)

    def _take(self, name: str, data: bytes, info: Mapping[str, int]) -> None:
        came = info.get("received_timestamp") or time.time_ns()
        with self._lock:
            if self._waiting + len(data) > WAITING:
                self.dropped[name] += 1
                return
            self._waiting += len(data)
            self.count += 1
        self._queue.put((name, data, came, info.get("source_timestamp") or came))

    # --- writer's thread ---

    def _write(self) -> None:
        flushed = time.monotonic()
        dirty = False
        while True:
            try:
                entry = self._queue.get(timeout=1.0)
            except queue.Empty:
                entry = ()  # type: ignore[assignment]
            if entry is None:
                return
            try:
                if isinstance(entry, Topic):
                    self._bag.add_topic(entry)
                elif entry:
                    with self._lock:
                        self._waiting -= len(entry[1])
                    if self.problem is None:
                        self._bag.write(*entry)
                        dirty = True
                if dirty and time.monotonic() - flushed > 1.0:
                    self._bag.flush()
                    flushed, dirty = time.monotonic(), False
            except OSError as error:
                self.problem = self.problem or error


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Turn SIGINT, SIGTERM and SIGHUP into the yielded event. Main thread only."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``waste-seg record``."""
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="of the bag; by default recording_DATE_TIME"
    )
    parser.add_argument("--namespace", default="", help="of the nodes, e.g. 'line1'")
    parser.add_argument(
        "--image-topic", default="image_raw", metavar="TOPIC", help="default: image_raw"
    )
    parser.add_argument(
        "--images",
        default="auto",
        choices=IMAGES,
        help="auto: raw, or compressed where there is no raw image",
    )
    parser.add_argument(
        "--topics",
        nargs="+",
        metavar="TOPIC",
        help=f"these beside the image, * for anything; default: {' '.join(TOPICS)}",
    )
    parser.add_argument("--also", nargs="+", default=[], metavar="TOPIC", help="and these")
    parser.add_argument("--duration", type=float, metavar="S", help="end after S seconds")
    parser.add_argument(
        "--compression", default="lz4", choices=tuple(COMPRESSIONS), help="of the file"
    )
    parser.add_argument(
        "--split", type=float, default=0, metavar="MB", help="begin a new file after so many MB"
    )
    parser.add_argument(
        "--keep", type=int, default=0, metavar="N", help="with --split: keep the newest N files"
    )


def run(args: argparse.Namespace) -> int:
    """Run ``waste-seg record``; 0, 1 if nothing could be recorded, 2 for a wrong option."""
    for problem, wrong in (
        ("--split takes a size in MB", args.split < 0),
        ("--keep takes a number of files from 1, with --split", args.keep < 0),
        ("--keep needs --split MB", args.keep and not args.split),
        ("--duration takes seconds", args.duration is not None and args.duration <= 0),
    ):
        if wrong:
            print(f"waste-seg record: {problem}", file=sys.stderr)
            return 2
    folder = args.output or Path(time.strftime("recording_%Y%m%d_%H%M%S"))
    try:
        return _run(args, folder.expanduser())
    except (RecordingError, OSError) as error:
        print(f"waste-seg record: {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace, folder: Path) -> int:
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.signals import SignalHandlerOptions

    from waste_seg_ros.nodes import use_image_profile

    base = "/" + args.namespace.strip("/")
    selection = Selection(
        tuple(_absolute(base, name) for name in (*(args.topics or TOPICS), *args.also)),
        _absolute(base, args.image_topic),
        args.images,
    )
    use_image_profile()
    with stop_requests() as stop:
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        try:
            node = rclpy.create_node("record")
            executor = SingleThreadedExecutor()
            executor.add_node(node)
            bag = BagWriter(
                folder,
                compression=args.compression,
                split_bytes=int(args.split * 1e6),
                keep=args.keep,
            )
            recorder = Recorder(node, bag, selection)
            print(f"recording to {folder}; Ctrl-C ends it", flush=True)
            end = time.monotonic() + (args.duration or float("inf"))
            try:
                while not stop.is_set() and time.monotonic() < end and recorder.problem is None:
                    executor.spin_once(timeout_sec=0.1)
                there = dict(node.get_topic_names_and_types())
            finally:
                recorder.close()
                executor.shutdown()
                node.destroy_node()
        finally:
            rclpy.try_shutdown()
    return _tell(folder, bag, recorder, there)


def _tell(folder: Path, bag: BagWriter, recorder: Recorder, there: Collection[str]) -> int:
    counts = bag.counts
    for name, number in sorted(recorder.dropped.items()):
        print(
            f"{name}: {number} messages dropped, the disk is too slow: leave out images "
            "(--images compressed) or record to a faster disk",
            file=sys.stderr,
        )
    if bag.dropped_files:
        print(f"{bag.dropped_files} older files removed (--keep)")
    listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    print(f"{folder}: {counts.total()} messages, {bag.size / 1e6:.1f} MB: {listed or 'none'}")
    if recorder.problem is not None:
        print(
            f"waste-seg record: {folder}: {recorder.problem.strerror or recorder.problem}; what "
            f"was written before can be read: waste-seg replay {folder} --repair FOLDER",
            file=sys.stderr,
        )
        return 1
    if not counts:
        print(
            "waste-seg record: nothing came on the topics asked for; topics there are: "
            f"{', '.join(sorted(there)) or 'none'} (ROS_DOMAIN_ID "
            f"{os.environ.get('ROS_DOMAIN_ID') or '0'}); see `waste-seg doctor`",
            file=sys.stderr,
        )
        return 1
    return 0


def _absolute(base: str, name: str) -> str:
    return name if name.startswith("/") else f"{base.rstrip('/')}/{name}"
