"""Files that appear whole, or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from fedloop_events.files import PRIVATE, new_file, write_folder, write_private, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_one_that_is_there_unless_that_one_is_to_stay(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data, replace, found in ((b"one", True, b"one"), (b"two", True, b"two"), (b"three", False, b"two")):
        write_whole(path, data, replace=replace)
        assert (path.read_bytes(), names(tmp_path)) == (found, ["file"])
    write_whole(tmp_path / "other", b"four", replace=False)
    assert (tmp_path / "other").read_bytes() == b"four"


def test_a_private_file_is_its_owners_from_the_first_byte_on(tmp_path: Path) -> None:
    with new_file(tmp_path, ".new-", mode=PRIVATE) as new:
        assert new.path.stat().st_mode & 0o777 == PRIVATE
    write_private(tmp_path / "key", b"secret")
    assert (tmp_path / "key").stat().st_mode & 0o777 == PRIVATE


def test_what_is_not_published_leaves_nothing_behind(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"whole")
    with suppress(ZeroDivisionError), new_file(tmp_path, ".file.") as new:
        new.file.write(b"half")
        raise ZeroDivisionError
    assert (names(tmp_path), (tmp_path / "file").read_bytes()) == (["file"], b"whole")


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()

    def full(_: int) -> None:
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            write_folder(out, {"a": b"1"})
    assert [*tmp_path.iterdir()] == ([out] if there else [])
    write_folder(out, {"a": b"1", "b": b"2"})
    assert {each.name: each.read_bytes() for each in out.iterdir()} == {"a": b"1", "b": b"2"}
    with pytest.raises(FileExistsError):
        write_folder(out, {"a": b"3"})
    assert [*tmp_path.iterdir()] == [out]
    assert (out / "a").read_bytes() == b"1"
