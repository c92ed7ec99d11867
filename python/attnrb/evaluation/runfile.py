"""The file of a run: JSON lines that a person can read, one for each finished item, which survive a kill at any moment.

The first line of every start says how the run was made; each other line is one answer of one model to one item. Lines
are only ever appended, by one write each, so that several processes may share the file. What a kill cut short is no
whole line and is left out at the next start, when its item is simply evaluated again.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from attnrb.evaluation.environment import environment

__all__ = ["Key", "RunFile", "RunFileError", "check_usable", "open_together"]

_FORMAT = 1
_HEADER = b'{"attnrb_eval":'  # how the first line of every start begins


class RunFileError(RuntimeError):
    """A run's file cannot be used or written. The message is one sentence that says what to do."""


class Key(NamedTuple):
    """What an answer is to: the fields that no two lines share."""

    task: str
    item: int
    arm: str
    prompting: str
    budget: tuple[int, int] | None


def key_of(record: Mapping[str, Any]) -> Key:
    """The key of a record."""
    budget = record["budget"]
    return Key(
        record["task"], record["item"], record["arm"], record["prompting"], None if budget is None else tuple(budget)
    )


class RunFile:
    """The finished items of a run, on disk.

    Args:
        path: the file, which is made where there is none.
        identity: what every answer depends on beside its own fields; a file with another one is refused.
        lock: keep other runs out of the file. One process of a run does, and it cleans up after a kill.

    Raises:
        RunFileError: the file cannot be opened, is in use by another run, is no such file, or has another identity.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, lock: bool = True) -> None:
        self.path = path
        self.records: dict[Key, dict[str, Any]] = {}
        self.unreadable = 0
        """Lines that could not be read; their items count as unfinished."""
        self.seconds = 0.0
        """Time that earlier starts spent on the items on disk."""
        self._alone = lock
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise RunFileError(f"run: {str(path)!r} could not be opened: {error.strerror}") from error
        try:
            if lock:
                _lock(self._file, path)
            self._read(dict(identity))
        except BaseException:
            os.close(self._file)
            raise

    def start(self, header: Mapping[str, Any]) -> None:
        """Note that a run starts or goes on, with whatever `header` says of it beside its identity."""
        self._write([{"attnrb_eval": _FORMAT, "identity": self._identity, **header}])

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Put finished items on disk.

        Raises:
            RunFileError: they could not be written, as where the disk is full. Those before are kept.
        """
        finished = [dict(record) for record in records]
        self._write(finished)
        self.records.update((key_of(record), record) for record in finished)

    def reread(self) -> None:
        """Read what other processes have written."""
        self._read(self._identity)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> RunFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        # One write for each line: whole lines alone reach the disk, whoever else writes.
        for line in lines:
            # A file's name may hold a lone surrogate, which becomes its escape in JSON.
            data = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")
            size = os.fstat(self._file).st_size
            try:
                written = os.write(self._file, data)
                if written < len(data):
                    os.write(self._file, data[written:])  # says why not
            except OSError as error:
                if self._alone:
                    with contextlib.suppress(OSError):
                        os.ftruncate(self._file, size)
                raise RunFileError(
                    f"run: {str(self.path)!r} could not be written: {error.strerror}; the {len(self.records):,} "
                    "finished items in it are kept, and the same command continues from there"
                ) from error

    def _read(self, identity: dict[str, Any]) -> None:
        self._identity = identity
        self.records, self.unreadable, self.seconds = {}, 0, 0.0
        with self.path.open("rb") as file:
            data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data) and self._alone:  # a kill cut the last line short
            os.ftruncate(self._file, whole)
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError
                if "attnrb_eval" in record:
                    _check_header(self.path, record, identity)
                    continue
                key = key_of(record)
            except (ValueError, KeyError, TypeError):
                if number == 1:
                    raise RunFileError(
                        f"run: {str(self.path)!r} is no file of a run: name another one with --run"
                    ) from None
                self.unreadable += 1
                continue
            self.records[key] = record
            self.seconds += float(record.get("seconds", 0.0))


def check_usable(path: Path, identity: Mapping[str, Any]) -> None:
    """Whether a run can use a file, as far as that is known before its model is read, which may take minutes.

    Args:
        path: the file; one that is not there yet can be used.
        identity: some of what `RunFile` takes.

    Raises:
        RunFileError: it is in use by another run, or was made with something else.
    """
    if not path.is_file():
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise RunFileError(f"run: {str(path)!r} could not be opened: {error.strerror}") from error
    with file:  # closing it gives the lock back
        _lock(file.fileno(), path, fcntl.LOCK_SH)
        for line in file:
            if line.startswith(_HEADER):
                with contextlib.suppress(json.JSONDecodeError):
                    _check_header(path, json.loads(line), identity, among=identity)


def _lock(file: int, path: Path, kind: int = fcntl.LOCK_EX) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        raise RunFileError(f"run: {str(path)!r} is in use by another run") from None


def _check_header(
    path: Path, header: Mapping[str, Any], identity: Mapping[str, Any], among: Iterable[str] | None = None
) -> None:
    """Raise RunFileError where the file was made with another identity; `among` names the parts that count."""
    before = header.get("identity")
    if header["attnrb_eval"] != _FORMAT or not isinstance(before, dict):
        raise RunFileError(f"run: {str(path)!r} was made by another version of attnrb: name another file")
    for name in sorted({*before, *identity} if among is None else among):
        if before.get(name) != identity.get(name):
            raise RunFileError(
                f"run: {str(path)!r} was made with {name} {before.get(name)!r} and not {identity.get(name)!r}: "
                "name another file with --run"
            )


def open_together(
    path: Path, identity: Mapping[str, Any], settings: Mapping[str, Any], *, rank: int, wait: Callable[[], None]
) -> RunFile:
    """A run's file in each of its processes: the first one opens and locks it and notes the start, then the others.

    Args:
        path: of the file.
        identity: as `RunFile` has it.
        settings: of the run, for the line that notes its start.
        rank: of this process, from 0.
        wait: returns when all processes have called it.

    Raises:
        RunFileError: it cannot be used.
    """
    if rank:
        wait()
        return RunFile(path, identity, lock=False)
    file = RunFile(path, identity)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    file.start({"started": now, "settings": settings, "environment": environment()})
    wait()
    return file
