"""Which checkpoint of a directory a run goes on from. ``last_checkpoint`` is a hint, not the truth.

It is the one that ``last_checkpoint`` names, or one of a later iteration that was written after
``last_checkpoint``: a run may be killed between the two. Where the named one is missing or damaged,
or none is named, it is the intact one of the greatest iteration.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathManager as PathManagerBase

from .safe_load import WeightsError, load_file

logger = logging.getLogger(__name__)

POINTER = "last_checkpoint"
# Others, such as a user's model_best.pth, count where last_checkpoint names them.
_OF_A_RUN = re.compile(r"model_(\d{7,}|final|latest|before_evaluation)\.pth")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or none that is intact. The message names the file,
    the reason, what is intact, and what to do."""


class _File(NamedTuple):
    name: str
    size: int
    written: int  # ns
    changed: int  # ns, which no tool can set


class _Directory(NamedTuple):
    """All that the choice follows from: for each state, it is made and said once."""

    path: str
    pointed: str  # what last_checkpoint says; "" for nothing
    tagged: int  # when last_checkpoint was written, ns
    files: tuple[_File, ...]


def newest_checkpoint(directory: str, path_manager: PathManagerBase = PathManager) -> str:
    """The path of the newest checkpoint that is intact; "" where there is none. A warning says why
    it is not the one that ``last_checkpoint`` names; of ``s3://`` and the like it always is.

    All of the file is read, as ``torch.load`` does not look at the checksums of what it reads.

    Raises:
        CheckpointError: none is intact, though there are some, or ``last_checkpoint`` names one: a
            run was here, and would not be continued by starting afresh.
    """
    if "://" in directory:
        pointed = _read_pointer(directory, path_manager)
        return os.path.join(directory, pointed) if pointed else ""
    return _choose(_scan(directory)) if directory else ""


def describe_last(directory: str) -> str:
    """Half a sentence about the last checkpoint, for the message of another error."""
    if last := last_readable(directory):
        return f"the last checkpoint {os.path.join(directory, last[0])}{_at(last[1])} is intact"
    return "there is no checkpoint yet"


def last_readable(directory: str) -> tuple[str, int] | None:
    """As :func:`newest_checkpoint`, but without the checksums, which takes milliseconds, and
    without warnings and errors.

    Returns:
        name and iteration (-1 where the file has none); None where there is none.
    """
    with contextlib.suppress(Exception):  # of a disk that has failed, or of handlers of s3://
        if "://" not in directory:
            return next(_best_first(_scan(directory), {}), None)
        if pointed := _read_pointer(directory, PathManager):
            return pointed, -1
    return None


def _read_pointer(directory: str, path_manager: PathManagerBase) -> str:
    try:
        with path_manager.open(os.path.join(directory, POINTER), "rb") as f:
            return f.read().decode(errors="replace").strip()
    except OSError:
        return ""


def _scan(directory: str) -> _Directory:
    def stat(name: str) -> os.stat_result | None:
        try:
            return os.stat(os.path.join(directory, name))
        except (OSError, ValueError):  # ValueError: no file can have this name
            return None

    pointed = _read_pointer(directory, PathManager)
    names = os.listdir(directory) if os.path.isdir(directory) else []
    names = {name for name in names if _OF_A_RUN.fullmatch(name)} | ({pointed} - {""})
    found = {name: stats for name in sorted(names) if (stats := stat(name))}
    files = [_File(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found.items()]
    pointer = stat(POINTER)
    return _Directory(directory, pointed, pointer.st_mtime_ns if pointer else 0, tuple(files))


@functools.lru_cache(maxsize=16)
def _choose(directory: _Directory) -> str:
    path, pointed, _, files = directory
    unusable: dict[str, str] = {}  # name -> the reason
    if pointed and pointed not in (file.name for file in files):
        unusable[repr(pointed[:80])] = f"(named by {POINTER}) does not exist"
    elif not files:
        return ""
    for name, iteration in _best_first(directory, unusable):
        if reason := _wrong_checksum(os.path.join(path, name)):
            unusable[name] = reason
            continue
        why = [f"{other} {reason}" for other, reason in unusable.items()]
        if not pointed:
            why = [f"{POINTER} is missing or empty", *why]
        elif not why and name != pointed:
            why = [f"{POINTER} names {pointed}, but a later one was saved after that"]
        if why:
            logger.warning(f"{path}: {'; '.join(why)}. {name}{_at(iteration)} is intact and used")
        return os.path.join(path, name)
    reasons = "; ".join(f"{name} {reason}" for name, reason in unusable.items())
    raise CheckpointError(
        f"no checkpoint in {path} is intact: {reasons}. Put a copy there that is; or, to start at "
        f"iteration 0, delete them and {POINTER}, or name another output directory"
    )


def _best_first(directory: _Directory, unusable: dict[str, str]) -> Iterator[tuple[str, int]]:
    """Name and iteration of the checkpoints that can be read, each read when it is its turn. Those
    that cannot are added to ``unusable``; the caller adds those that it refuses."""
    path, pointed, tagged, files = directory
    written = {file.name: file.written for file in files}

    def best(names: list[str]) -> list[tuple[str, int]]:
        iterations = {}
        for name in names:
            try:
                iterations[name] = iteration_of(os.path.join(path, name))
            except WeightsError as error:
                reason = str(error).removeprefix(f"{os.path.join(path, name)} ")
                unusable[name] = reason.partition(". ")[0]
        return sorted(iterations.items(), key=lambda x: (x[1], written[x[0]]), reverse=True)

    if pointed in written:
        first = best([n for n in written if n == pointed or written[n] > tagged])
        if (named := dict(first).get(pointed)) is not None:
            yield from ((n, i) for n, i in first if n == pointed or i > named)
    yield from best([n for n in written if n not in unusable])


def iteration_of(path: str) -> int:
    """The last iteration, from 0, of a checkpoint; -1 where the file has none.

    Raises:
        WeightsError: the file cannot be read.
    """
    # Without the data, where the format has them apart.
    content = load_file(path, "meta" if zipfile.is_zipfile(path) else "cpu")
    iteration = content.get("iteration") if isinstance(content, Mapping) else None
    return iteration if isinstance(iteration, int) else -1


def _wrong_checksum(path: str) -> str:
    """What of a file differs from its checksum, as the end of a sentence; "" for nothing."""
    try:
        if not zipfile.is_zipfile(path):  # has none
            return ""
        with zipfile.ZipFile(path) as file:
            record = file.testzip()
        return f"is damaged (in {record}, by its checksum)" if record else ""
    except Exception as error:  # what zipfile makes of a damaged file
        return f"is damaged ({type(error).__name__}: {error})"


def _at(iteration: int) -> str:
    return f" (iteration {iteration})" if iteration >= 0 else ""
