"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path

# A folder that takes no new file, or a file that is mounted by itself: the file may take new content all the same.
_CANNOT_REPLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one step: after a failure, such as a full disk, what was there before is still.

    A link stays a link, and a file keeps its permissions. Devices and pipes are written to: replacing them would take
    ``/dev/null`` from everybody. So are files that cannot be replaced.

    Args:
        path: the file.
        content: bytes, or text, which becomes UTF-8; a lone surrogate, as of a file name that is no UTF-8, is written
            as its escape in JSON.

    Raises:
        OSError: it cannot be written.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        path.write_bytes(data)
        return
    try:
        _replace(Path(os.path.realpath(path)), data, mode)
    except OSError as error:
        if mode is None or error.errno not in _CANNOT_REPLACE or not os.access(path, os.W_OK):
            raise
        path.write_bytes(data)


def _replace(path: Path, data: bytes, mode: int | None) -> None:
    """Put a file in the place of `path`, with the permissions `mode`, or with those of a new file."""
    handle, scratch = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(scratch, 0o666 & ~_umask() if mode is None else stat.S_IMODE(mode))
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise


def _umask() -> int:
    # mkstemp makes files that only their owner can read, and nothing but setting it tells the mask.
    mask = os.umask(0)
    os.umask(mask)
    return mask
