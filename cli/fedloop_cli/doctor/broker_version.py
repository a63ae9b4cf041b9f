"""How new a Kafka broker is, asked as every client asks first: ApiVersions, version 3 (https://kafka.apache.org/protocol).

librdkafka does not show it. The request is allowed before a user is let in; the answer names no release, but the newest
`metadata.version` that the broker knows, which rises with each.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from fedloop_events.errors import UnreachableError

KAFKA_3_9: Final = 21
"""`metadata.version` of Kafka 3.9; that of 4.0 begins at 22 (org.apache.kafka.server.common.MetadataVersion)."""
_MOST_BYTES: Final = 1 << 20
_SUPPORTED_FEATURES: Final = 0


def metadata_version(connection: socket.socket) -> int:
    """The newest `metadata.version` that the broker at the other end knows, 0 if it knows none (before KRaft).

    Raises `UnreachableError` if what is there does not answer in Kafka's protocol; the socket's timeout bounds each wait.
    """
    name = b"fedloop"
    body = struct.pack(">hhih", 18, 3, 1, len(name)) + name + b"\x00" + _compact(name) + _compact(b"1") + b"\x00"
    try:
        connection.sendall(struct.pack(">i", len(body)) + body)
        (size,) = struct.unpack(">i", _exactly(connection, 4))
        if not 0 < size <= _MOST_BYTES:
            raise ValueError("size")
        return _newest(_Answer(_exactly(connection, size)))
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise UnreachableError("it does not answer as a Kafka broker does", cause=type(error).__name__) from None


def _newest(answer: _Answer) -> int:
    answer.skip(4)  # correlation id
    if answer.int16() != 0:
        raise ValueError("error code")
    for _ in range(answer.length()):
        answer.skip(6)  # a request's number, its oldest and newest version
        answer.skip_tags()
    answer.skip(4)  # throttle time
    for _ in range(answer.varint()):
        tag, size = answer.varint(), answer.varint()
        if tag != _SUPPORTED_FEATURES:
            answer.skip(size)
            continue
        for _ in range(answer.length()):
            feature, _, newest = answer.take(answer.length()), answer.int16(), answer.int16()
            answer.skip_tags()
            if feature == b"metadata.version":
                return newest
    return 0


class _Answer:
    """Reads Kafka's compact encoding. Raises `ValueError` where it ends too early."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) != count:
            raise ValueError("cut short")
        self._at += count
        return taken

    def skip(self, count: int) -> None:
        self.take(count)

    def int16(self) -> int:
        return int.from_bytes(self.take(2), "big", signed=True)

    def varint(self) -> int:
        value = 0
        for shift in range(0, 35, 7):
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("varint")

    def length(self) -> int:
        """Of a compact string or array, which are written as one more."""
        return max(0, self.varint() - 1)

    def skip_tags(self) -> None:
        for _ in range(self.varint()):
            self.varint()
            self.skip(self.varint())


def _compact(text: bytes) -> bytes:
    return bytes([len(text) + 1]) + text


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ValueError("closed")
        data += more
    return data
