"""Files that are whole or absent, whatever happens while they are written.

A file is written under another name, brought to the disk, and renamed: ``rename`` of POSIX puts one
file in the place of another at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

import safetensors.torch
import torch
from iopath.common.file_io import PathManager

from .lock import try_lock
from .newest import CheckpointError, describe_last, last_readable

logger = logging.getLogger(__name__)

_PARTIAL = re.compile(r"(.+\.(pth|safetensors)|last_checkpoint)\.[0-9a-f]{8}\.partial")
PERIODIC = re.compile(r"model_(\d{7,})\.pth")  # of fvcore's PeriodicCheckpointer
_OF_A_RUN = re.compile(r"model_\w+\.(pth|safetensors)|last_checkpoint")
_writing = threading.Lock()
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Write a local file that takes the place of an earlier one only when it is whole.

    Args:
        write: is given the file, open for writing.

    Raises:
        CheckpointError: it could not be written, and is as it was before.
    """
    partial = ""
    try:
        with _writing:
            file, partial = _open_partial(path)
            with file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)  # while it is locked
            _sync_directory(os.path.dirname(path))
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(partial)
        reason = _os_error(error) if isinstance(error, (OSError, RuntimeError)) else None
        if reason is None:
            raise
        raise CheckpointError(_describe(path, reason)) from error


def finish_writing(seconds: float = 60) -> None:
    """Before another thread ends this process: let :func:`write_atomically` come to its end, for so
    long, and begin no more."""
    _writing.acquire(timeout=seconds)


def _open_partial(path: str) -> tuple[IO[bytes], str]:
    """A new file beside ``path``, locked, and its name."""
    while True:
        partial = f"{path}.{secrets.token_hex(4)}.partial"
        file = open(partial, "xb")
        # Before it is locked, another process may take it for a left-over.
        if try_lock(file) is not False and os.path.exists(partial):
            return file, partial
        file.close()


def _sync_directory(directory: str) -> None:
    """Bring the names in it to the disk."""
    descriptor = os.open(directory or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(descriptor)


def _os_error(error: BaseException | None) -> OSError | None:
    """What made the system refuse: torch.save hides it behind a RuntimeError of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _describe(path: str, reason: OSError) -> str:
    message = f"{path} could not be written: {reason.strerror or reason}. "
    directory, name = os.path.split(path)
    remedy = "Free space there" if reason.errno in _FULL else "Mend that"
    if not _OF_A_RUN.fullmatch(name):
        return f"{message}{remedy}, and start again"
    if reason.errno in _FULL:
        remedy += (
            ", or keep fewer checkpoints (SOLVER.CHECKPOINT_KEEP, in lazy configs "
            "train.checkpointer.max_to_keep)"
        )
    last = describe_last(directory)
    again = "continue with --resume" if last_readable(directory) else "start again"
    return f"{message}{last[0].upper()}{last[1:]}. {remedy}, and {again}"


def remove_partial_files(directory: str) -> None:
    """Remove what killed runs have left half written in a local directory.

    What another process is writing just now, perhaps on another machine, is locked and stays. On a
    file system without locks, what was written to within the last hour stays.
    """
    with contextlib.suppress(OSError):  # if it matters, writing fails too, and says why
        for name in os.listdir(directory):
            if _PARTIAL.fullmatch(name):
                _remove_left(os.path.join(directory, name))


def _remove_left(partial: str) -> None:
    with contextlib.suppress(OSError), open(partial, "r+b") as file:
        locked = try_lock(file)
        if locked or (locked is None and time.time() - os.fstat(file.fileno()).st_mtime > 3600):
            os.remove(partial)


def periodic_checkpoints(path_manager: PathManager, directory: str, last: int) -> list[str]:
    """The names of the periodic checkpoints in a directory up to iteration ``last``, oldest
    first."""
    try:
        found = [PERIODIC.fullmatch(name) for name in path_manager.ls(directory)]
    except (OSError, NotImplementedError):
        return []
    iterations = {match[0]: int(match[1]) for match in found if match}
    return sorted((n for n in iterations if iterations[n] <= last), key=iterations.get)


def remove_checkpoints(path_manager: PathManager, directory: str, names: list[str]) -> None:
    """Remove checkpoints that are there, and only warn of those that cannot be removed."""
    for name in names:
        try:
            path_manager.rm(os.path.join(directory, name))
        except FileNotFoundError:
            pass
        except (OSError, NotImplementedError) as error:
            logger.warning(f"{name} in {directory}, an old checkpoint, cannot be removed: {error}")


def metrics_of(metrics: Mapping[str, float], *, ema: bool) -> dict[str, float]:
    """Of the metrics of an evaluation, those of the weights, or of their average (``ema/``)."""
    average = {k.removeprefix("ema/"): v for k, v in metrics.items() if k.startswith("ema/")}
    return average if ema else {k: v for k, v in metrics.items() if not k.startswith("ema/")}


def to_safetensors(
    tensors: Mapping[str, torch.Tensor], known: Mapping[str, Any], **texts: str
) -> bytes:
    """The content of a ``.safetensors`` file, which knows no strides and no shared memory. Its
    metadata have ``known`` as JSON, and ``texts``."""
    plain = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)  # not the extra state that a module may have
    }
    texts |= {key: json.dumps(value) for key, value in known.items()}
    metadata = {f"gn_detect.{key}": text for key, text in texts.items()}
    return safetensors.torch.save(plain, {"format": "pt", **metadata})
