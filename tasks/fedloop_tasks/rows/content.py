"""What a file really is, and its text: unpacked and decoded, within bounds."""

from __future__ import annotations

import codecs
import gzip
import io
import shlex
import zlib
from pathlib import Path
from typing import Final

from fedloop_events.errors import UsageError

from fedloop_tasks.rows.rows import MAX_FILE_BYTES

_PARQUET: Final = b"PAR1"
_GZIP: Final = b"\x1f\x8b"
_OTHERS: Final = (
    (0, b"PK\x03\x04", "a ZIP archive, as an .xlsx or .ods workbook is"),
    (0, b"\xd0\xcf\x11\xe0", "an old Office file (.xls)"),
    (0, b"%PDF", "a PDF file"),
    (0, b"{\\rtf", "a text with formatting (RTF)"),
    (0, b"PARE", "an encrypted Parquet file"),
    (0, b"ARROW1", "an Arrow file (Feather)"),
    (0, b"ORC", "an ORC file"),
    (0, b"Obj\x01", "an Avro file"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"BZh", "compressed with bzip2"),
    (0, b"\xfd7zXZ", "compressed with xz"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (0, b"7z\xbc\xaf", "a 7z archive"),
    (0, b"\x80\x04\x95", "a Python pickle"),
    (257, b"ustar", "a tar archive"),
)
"""Where a file of another kind shows what it is."""
_ENCODINGS: Final = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SAVE: Final = "save it as CSV in UTF-8, or as JSON Lines or Parquet"


def text_of(path: Path) -> str | None:
    """The file's text, unpacked if gzip packed it: UTF-8, or UTF-16 or UTF-32. None for a Parquet file, which is not read.

    Raises `UsageError`, for a file of another kind with what it is.
    """
    try:
        with path.open("rb") as file:
            data = file.read(len(_PARQUET))
            if data == _PARQUET:
                return None
            data += file.read(MAX_FILE_BYTES + 1 - len(data))
    except OSError as error:
        raise UsageError(f"{path} cannot be read", cause=error.strerror or "") from None
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes", hint="divide it")
    packed = data.startswith(_GZIP)
    if packed:
        data = _unpacked(path, data)
    _check_text(path, data)
    encoding = next((name for mark, name in _ENCODINGS if data.startswith(mark)), None) or _unmarked(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _undecodable(path, data[: error.start], encoding, packed) from None


def _check_text(path: Path, data: bytes) -> None:
    if not data.strip():
        raise UsageError(f"{path} is empty")
    if data.startswith((_GZIP, _PARQUET)):
        raise UsageError(f"{path} is compressed with gzip, and what is in it is no text", hint="unpack it")
    for at, magic, what in _OTHERS:
        if data.startswith(magic, at):
            raise UsageError(f"{path} is {what}, not text", hint=f"unpack it, or {_SAVE}")
    if data[:1000].lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise UsageError(f"{path} is an HTML or XML document", hint=_SAVE)


def _undecodable(path: Path, before: bytes, encoding: str, packed: bool) -> UsageError:
    """The error of a file that has no character after the bytes `before`."""
    said, place = encoding.upper(), f"line {before.decode(encoding).count(chr(10)) + 1}, byte {len(before)}"
    if encoding != "utf-8-sig":
        return UsageError(f"{path} is not {said}: {place}", hint="it is cut off or damaged: save it again")
    source = shlex.quote(str(path))
    convert = f"gunzip -c < {source} | iconv -f cp1252 -t utf-8" if packed else f"iconv -f cp1252 -t utf-8 {source}"
    return UsageError(f"{path} is not UTF-8: {place}", hint=f"if a Windows program wrote it: {convert} > NEW.csv")


def _unpacked(path: Path, data: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = file.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(
            f"{path} is compressed with gzip, and damaged or cut off", cause=str(error), hint="copy it again"
        ) from None
    if len(unpacked) > MAX_FILE_BYTES:
        raise UsageError(f"{path} unpacks to more than {MAX_FILE_BYTES:,} bytes", hint="divide it")
    return unpacked


def _unmarked(data: bytes) -> str:
    """UTF-8, unless each second byte of the first characters is 0, as in UTF-16 without its mark."""
    first, second = data[0:8:2], data[1:8:2]
    if any(first) and second and not any(second):
        return "utf-16-le"
    return "utf-16-be" if any(second) and not any(first) else "utf-8-sig"
