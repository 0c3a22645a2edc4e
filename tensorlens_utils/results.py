"""Long work into a table on disk: rows fill a file as they are made, and a run that was stopped goes on where it was.

The file is JSON lines: a head with the table's key and settings, then one row a line. All that a run has to remember is
in it, so that a run may be killed at any moment and started again, and that several processes may fill one table: each
claims a job that no other holds and that is not yet in the file. They need not know of one another; any launcher does,
as `accelerate launch --multi_gpu script.py`, `torchrun --nproc-per-node 4 script.py`, or two terminals. They must see
the same file with its locks: one machine, or a network's file system that carries POSIX locks.

>>> import tempfile
>>> from tensorlens_utils.results import Job, fill, read
>>> def square(n):
...     return [{"n": n, "square": n * n}]
>>> path = f"{tempfile.mkdtemp()}/squares.jsonl"
>>> table = fill(path, [Job([(n,)], lambda n=n: square(n)) for n in range(3)], key=["n"], settings={"power": 2})
>>> table.rows
[{'n': 0, 'square': 0}, {'n': 1, 'square': 1}, {'n': 2, 'square': 4}]
>>> read(path).settings
{'power': 2}
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

EVERY = 10.0  # seconds between two lines of progress; work that takes less shows none


class Job(NamedTuple):
    """A piece of the work: the keys of its rows, and the call that makes these rows, in any order.

    A key is the tuple of a row's values under the table's key columns.
    """

    keys: Sequence[tuple]
    run: Callable[[], Iterable[dict[str, Any]]]


@dataclass(frozen=True)
class Table:
    """Rows, in the order of their keys, with the columns of the key and the settings that they were made with."""

    key: tuple[str, ...]
    settings: dict[str, Any]
    rows: list[dict[str, Any]]

    def where(self, **values: Any) -> list[dict[str, Any]]:
        """The rows with these values: `table.where(method="norm")`."""
        return [row for row in self.rows if all(row[name] == value for name, value in values.items())]


def fill(path: str | Path | None, jobs: Sequence[Job], *, key: Sequence[str], settings: dict[str, Any],
         progress: bool = True) -> Table:
    """Run the jobs whose rows the file does not hold, and give back the table of all jobs' rows.

    A job that was stopped half-way is run again, whole, so that its numbers are those of an undisturbed run; one that
    another process is at is waited for, and taken over if that process dies. Rows that no job asks for stay in the
    file. `path` None keeps nothing. Values are what JSON has (arrays become lists, NaN is refused).

    Raises ValueError where the file was made with another key or other settings, or is no table, and where a job makes
    other rows than it announced.
    """
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            return fill(Path(folder) / "table.jsonl", jobs, key=key, settings=settings, progress=progress)
    file = _File.begun(Path(path), key, settings)
    wanted = {k for job in jobs for k in job.keys}
    began = shown = time.monotonic()
    before = len(wanted & file.rows.keys())
    with open(file.claims, "ab") as claims:
        for wait in (False, True):  # first the jobs that are free, then those that others were at
            for job in jobs:
                if file.has(job.keys):
                    continue
                # One byte of the file of claims stands for one job; the system frees it when its holder dies.
                with _claimed(claims, zlib.crc32(repr(list(job.keys)).encode()), wait) as mine:
                    if not mine or file.catch_up().has(job.keys):
                        continue
                    file.append(_checked(job, file.key))
                if progress and time.monotonic() - shown > EVERY:
                    shown, done = time.monotonic(), len(wanted & file.rows.keys())
                    left = (shown - began) / (done - before) * (len(wanted) - done) / 60
                    print(f"{file.path.stem:18}{done:7,} of {len(wanted):,} rows   {left:.1f} minutes left", flush=True)
    file.claims.unlink(missing_ok=True)  # all is done, so whoever still waits for a claim has nothing left to do
    return file.table(wanted)


def read(path: str | Path) -> Table:
    """The table in a file, finished or not, as to redraw a figure from.

    Raises FileNotFoundError for a missing file, ValueError for one that is no table.
    """
    return _File(Path(path)).table()


def _checked(job: Job, key: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = [json.loads(json.dumps(row, allow_nan=False, default=lambda x: x.tolist())) for row in job.run()]
    made = {tuple(row.get(name) for name in key) for row in rows}
    if made != set(job.keys) or len(rows) != len(made):
        missing, other = sorted(set(job.keys) - made), sorted(made - set(job.keys))
        raise ValueError(f"A job makes one row for each of its keys ({', '.join(key)}): missing are {missing[:3]}, "
                         f"unannounced {other[:3]}, and {len(rows) - len(made)} come twice. Let run() give the rows "
                         "that keys names.")
    return rows


class _File:
    """A table's file, and what of it was read so far: `rows` by key, up to byte `end`, which ends a line."""

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        self.claims = path.with_name(path.name + ".claims")
        with open(path, "rb") as stream:
            line = stream.readline()
        self.end = len(line)
        try:
            head = json.loads(line)
            self.key, self.settings = tuple(head["key"]), head["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"A table's first line holds its key and settings, and {str(path)!r} begins with "
                             f"{line[:60]!r}. Give the path of a table that `fill` wrote, or of a new file.") from error
        self.catch_up()

    @classmethod
    def begun(cls, path: Path, key: Sequence[str], settings: dict[str, Any]) -> _File:
        """The file of a table with this key and these settings, made where there is none."""
        head = json.dumps({"key": [*key], "settings": settings}, allow_nan=False).encode() + b"\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path, "ab+") as stream:
            stream.seek(0)
            start = stream.read(len(head))
            if start != head and head.startswith(start):  # a new file, or one whose run was killed in its first line
                stream.truncate(0)
                stream.write(head)
        file, ours = cls(path), json.loads(head)
        theirs, ours = {"key": [*file.key], **file.settings}, {"key": ours["key"], **ours["settings"]}
        other = [f"{name} was {theirs.get(name)!r}, now is {ours.get(name)!r}" for name in {**theirs, **ours}
                 if theirs.get(name) != ours.get(name)]
        if other:
            raise ValueError(f"A table holds rows of one setting, and {str(path)!r} was made with another: "
                             f"{'; '.join(other)}. Give another path, or remove the file.")
        return file

    def catch_up(self) -> _File:
        """Read the lines that were added, by whichever process. A line without its end is still being written, or was
        cut off by a kill: it does not count."""
        with open(self.path, "rb") as stream:
            stream.seek(self.end)
            lines = stream.read().split(b"\n")[:-1]
        for line in lines:
            row = json.loads(line)
            self.rows.setdefault(tuple(row[name] for name in self.key), row)
            self.end += len(line) + 1
        return self

    def has(self, keys: Iterable[tuple]) -> bool:
        return all(k in self.rows for k in keys)

    def append(self, rows: list[dict[str, Any]]) -> None:
        with _locked(self.path, "r+b") as stream:
            self.catch_up()
            stream.seek(self.end)
            stream.truncate()  # what a killed process left of a line
            for row in rows:
                if tuple(row[name] for name in self.key) not in self.rows:
                    stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.catch_up()

    def table(self, wanted: set[tuple] | None = None) -> Table:
        keys = sorted(self.rows if wanted is None else wanted)
        return Table(self.key, self.settings, [self.rows[k] for k in keys])


@contextmanager
def _locked(path: Path, mode: str) -> Iterator[BinaryIO]:
    """The file, opened, while no other process writes to it."""
    with open(path, mode) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream  # closing unlocks


@contextmanager
def _claimed(claims: BinaryIO, byte: int, wait: bool) -> Iterator[bool]:
    """Whether one byte of the file could be locked, for as long as the context lasts."""
    try:
        fcntl.lockf(claims, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
    except (BlockingIOError, PermissionError):
        yield False
        return
    try:
        yield True
    finally:
        fcntl.lockf(claims, fcntl.LOCK_UN, 1, byte)
