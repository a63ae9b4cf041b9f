"""Run on a disk of 1 MiB by `test_full_disk.py`, in a process of its own: what the log does when that is full."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import samples
from fedloop_events import locations
from fedloop_events.errors import LogError
from fedloop_events.files import reason, write_whole
from fedloop_events.locations import DeploymentLocation
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.verify.log import verify


def fill(folder: Path) -> None:
    try:
        with (folder / "fill").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        pass


def append(log: SqliteLog, number: int) -> str:
    """Why it could not be appended."""
    try:
        log.append([samples.signed(samples.feedback(number))])
    except LogError as error:
        return error.message
    return ""


def killed(path: Path) -> None:
    """Leave the log as a process leaves it that was killed: with what is not yet in the database, without what was shared."""
    log = SqliteLog(path)
    append(log, 1)
    kept = {name: path.with_name(name).read_bytes() for name in ("log.sqlite", "log.sqlite-wal")}
    log.close()
    for name, content in kept.items():
        path.with_name(name).write_bytes(content)


def main(folder: Path, how: str) -> None:
    path = folder / "log.sqlite"
    with_deployment = SqliteLog(path)
    with_deployment.append([samples.signed(each) for each in (samples.created(), samples.enrolled())])
    if how != "open":
        with_deployment.close()
    if how == "killed":
        killed(path)
    count = 3 if how == "killed" else 2
    fill(folder)
    one, other = SqliteLog(path), SqliteLog(path)
    for log in (one, other, one):
        assert (len(log.read().records), log.check(), log.end().offsets) == (count, count, {"log": count})
        assert log.read(after=log.end(), wait_s=0.05).records == []
    if how != "open":
        for log in (one, other):
            assert "is full (0 bytes are free): nothing was appended" in append(log, 7)
    report = verify(DeploymentLocation(str(folder), None), lambda: locations.open_log(folder), lambda: locations.open_blobs("."))
    assert (report.events, report.verified) == (count, True), report
    for command in ("verify", "tail", "replay"):
        done = subprocess.run([sys.executable, "-m", "fedloop_cli.main", "log", command, folder], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    with pytest.raises(LogError, match="is full \\(0 bytes are free\\): nothing was appended"):
        SqliteLog(folder / "another.sqlite")
    with pytest.raises(OSError, match="another") as refused:
        write_whole(folder / "another", bytes(100_000))
    assert reason(refused.value, folder / "another") == "the disk is full (0 bytes are free): make room, then try again"
    (folder / "fill").unlink()
    assert append(one, 8) == append(other, 9) == ""
    assert [len(log.read().records) for log in (one, other)] == [count + 2] * 2
    one.close()
    other.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
