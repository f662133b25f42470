"""Locks that say who is writing a file, or into a directory, and that end with their process.

POSIX's record locks belong to a process: the kernel frees them when it ends, forked ones (data
loading workers) do not inherit them, and they hold over NFS. But a process loses one when it closes
*any* of its descriptors of that file: what is locked must not be opened again.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import sys
from typing import IO

from gn_detect.config import ConfigError

logger = logging.getLogger(__name__)

_JOBS = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")
# Process and path -> the open file; those of the process that has forked this one stay open, too.
_held: dict[tuple[int, str], IO[bytes]] = {}


def try_lock(file: IO) -> bool | None:
    """Lock a file that is open for writing, until it is closed: False where another process has
    locked it, None where its file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None


def lock_output(directory: str) -> None:
    """Keep other runs out of a directory until :func:`unlock_output` or the end of this process.
    In a process that has done so, and of ``s3://`` and the like, it does nothing.

    Raises:
        ConfigError: another run, which it names, is writing there. Or nothing can be written.
    """
    key = _, path = _key(directory)
    if "://" in directory or (key in _held and os.path.exists(path)):
        return
    try:
        os.makedirs(directory, exist_ok=True)
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    except OSError as error:
        raise ConfigError(
            f"{path}, which keeps other runs out of {directory}, cannot be written "
            f"({error.strerror}); mend that, or name another output directory"
        ) from None
    locked, other = try_lock(file), _describe(file.read())
    if locked is False:
        file.close()
        raise ConfigError(
            f"another run is writing into {directory}: {other or 'it does not say which'}. Wait "
            "for it, end it, or name another output directory"
        )
    if locked is None:
        logger.warning(f"{path} cannot be locked: nothing keeps other runs out of {directory}")
    elif other:
        logger.info(f"an earlier run in {directory} did not come to its end: {other}")
    with contextlib.suppress(OSError):  # the disk is full: the lock holds all the same
        file.truncate(0)
        file.seek(0)
        file.write(json.dumps(_this_run()).encode())
    _held[key] = file


def unlock_output(directory: str) -> None:
    """Let others into a directory that this process has locked, if it has. The file stays, empty,
    as its removal could meet another process that has just opened it."""
    if file := _held.pop(_key(directory), None):
        with contextlib.suppress(OSError), file:
            file.truncate(0)


def _key(directory: str) -> tuple[int, str]:
    return os.getpid(), os.path.join(os.path.realpath(directory), ".lock")


def _this_run() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": " ".join(sys.argv),
        **{name: os.environ[name] for name in _JOBS if os.environ.get(name)},
    }


def _describe(content: bytes) -> str:
    """What :func:`_this_run` has said, as text; "" where nothing is said."""
    with contextlib.suppress(ValueError, AttributeError):
        return ", ".join(f"{key} {value}" for key, value in json.loads(content).items())
    return content.decode(errors="replace").strip()
