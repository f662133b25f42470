"""Files that each machine of a run has to itself, and that must be the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from gn_detect.distributed import on_each_machine

from . import DataError


def check_same_files(files: Mapping[str, str]) -> None:
    """Compare the content of files over the machines of a run. All processes call it.

    Args:
        files: name for messages -> path, which may be another one on each machine.

    Raises:
        DataError: in all processes; a machine lacks a file that another one has, cannot read it, or
            has another content under its name than the first one; or they have other names. Says
            which file and machines.
    """
    if comm.get_world_size() == comm.get_local_size():
        return
    found = on_each_machine(lambda: {name: (p, _digest(p)) for name, p in files.items()})
    (first, expected), *others = found.items()
    for machine, theirs in others:
        if theirs.keys() != expected.keys():
            raise DataError(
                f"the datasets of {machine} are {', '.join(theirs) or 'none'}, those of {first} "
                f"{', '.join(expected) or 'none'}; start the same command on each machine"
            )
        for name, (path, digest) in expected.items():
            their_path, their_digest = theirs[name]
            if None in (digest, their_digest) and digest != their_digest:
                lacking, has = (machine, first) if digest else (first, machine)
                raise DataError(
                    f"{name}: there is no file {their_path if digest else path} on {lacking}, but "
                    f"on {has} there is; copy it from there"
                )
            if digest != their_digest:
                raise DataError(
                    f"{name}: {their_path} on {machine} is another file than {path} on {first}, "
                    "which counts; copy it from there"
                )


def _digest(path: str) -> str | None:
    """Of the content of a file; None where there is none."""
    digest = hashlib.blake2b()
    try:
        with open(PathManager.get_local_path(path), "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    return digest.hexdigest()
