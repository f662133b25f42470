"""Files that are whole or absent, whatever happens while they are written.

A file is written under another name, brought to the disk, and renamed: ``rename`` of POSIX puts one
file in the place of another at once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping
from typing import IO

import safetensors.torch
import torch
from iopath.common.file_io import PathManager

logger = logging.getLogger(__name__)

_PARTIAL = re.compile(r"(.+\.(pth|safetensors)|last_checkpoint)\.[0-9a-f]{8}\.partial")
_PERIODIC = re.compile(r"model_(\d{7,})\.pth")  # of fvcore's PeriodicCheckpointer
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written. The message names the file, the reason, what is
    intact, and what to do."""


def write_atomically(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Write a local file that takes the place of an earlier one only when it is whole.

    Args:
        path: of the file.
        write: is given the file, open for writing.

    Raises:
        CheckpointError: it could not be written, and is as it was before.
    """
    partial = f"{path}.{secrets.token_hex(4)}.partial"
    try:
        try:
            with open(partial, "xb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(partial)
            raise
        _sync_directory(os.path.dirname(path))
    except (OSError, RuntimeError) as error:
        reason = _os_error(error)
        if reason is None:
            raise
        raise CheckpointError(_describe(path, reason)) from error


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
    directory = os.path.dirname(path)
    remedy = "Mend that"
    if reason.errno in _FULL:
        remedy = (
            "Free space there, or keep fewer checkpoints (SOLVER.CHECKPOINT_KEEP, in lazy configs "
            "train.checkpointer.max_to_keep)"
        )
    message = f"{path} could not be written: {reason.strerror or reason}. "
    with contextlib.suppress(OSError):
        with open(os.path.join(directory, "last_checkpoint")) as f:
            earlier = os.path.join(directory, f.read().strip())
        if os.path.isfile(earlier):
            message += f"The earlier checkpoint {earlier} is intact. "
            return f"{message}{remedy}, and continue with --resume"
    return f"{message}There is no earlier checkpoint. {remedy}, and start again"


def remove_partial_files(directory: str) -> None:
    """Remove what killed runs have left half written in a local directory.

    Another run that is writing there just now loses its file, too: its save fails, and nothing
    else. Two runs in one directory would overwrite each other's checkpoints anyway.
    """
    with contextlib.suppress(OSError):  # if it matters, writing fails too, and says why
        for name in os.listdir(directory):
            if _PARTIAL.fullmatch(name):
                os.remove(os.path.join(directory, name))


def remove_old_checkpoints(
    path_manager: PathManager, directory: str, newest: str, keep: int
) -> None:
    """Remove periodic checkpoints (``model_0000123.pth``), but for the last ones.

    Those of later iterations than ``newest`` are of another run, and stay.

    Args:
        path_manager: of the directory.
        directory: of the checkpoints.
        newest: name of the one that ``last_checkpoint`` names; if it is not a periodic one, all
            stay.
        keep: how many of them stay, with ``newest``; 0: all.
    """
    if not keep or not (match := _PERIODIC.fullmatch(newest)):
        return
    last = int(match[1])
    try:
        names = {int(m[1]): m[0] for m in map(_PERIODIC.fullmatch, path_manager.ls(directory)) if m}
        for iteration in sorted(i for i in names if i <= last)[:-keep]:
            path_manager.rm(os.path.join(directory, names[iteration]))
    except (OSError, NotImplementedError) as error:
        logger.warning(f"old checkpoints in {directory} could not be removed: {error}")


def to_safetensors(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """The content of a ``.safetensors`` file, which knows no strides and no shared memory."""
    plain = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)  # not the extra state that a module may have
    }
    return safetensors.torch.save(plain, metadata)
