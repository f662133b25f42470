"""Reading a file of weights without trusting it.

A pickle may run any code when it is loaded, and so may what ``torch.save`` wrote. Here a file is
looked through before anything in it is followed: what it is (by its content; its name says
nothing), which functions it asks for, whether the sizes that it declares are sizes that it has,
and how often it repeats what it has. It takes the place of fvcore's and Detectron2's loaders,
which unpickle what they get.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import torch

from gn_detect.config import ConfigError

from . import pickle_globals, torch_files
from .pickle_machine import PickleMachine
from .untrusted import Damage, Refusal, Window

_TRUST = "if you trust it, load it with the code that wrote it and save its tensors as .safetensors"
_AGAIN = "download or copy it again"
_MAX_HEADER = 10_000_000  # bytes: some 100,000 tensors


class WeightsError(ConfigError):
    """A file of weights that is refused. The message names the file, what is wrong, and the fix."""


def load_file(path: str | os.PathLike) -> Any:
    """Read a file of weights; nothing in it is run, and what it takes is bounded by its size.

    All tensors and arrays together, counted as often as the content refers to them, have at most
    four times the bytes of the file and 16 MiB (weights may be tied or expanded), so that checks
    and copies of them are bounded too. What else is allocated is bounded by the limits in
    ``pickle_machine``.

    Args:
        path: of a file that ``torch.save`` wrote, of a pickle of numpy arrays (Detectron2's zoo,
            Caffe2, Detectron), or of a safetensors file. The kind is told by the content.

    Returns:
        The content: plain containers, numbers and strings, tensors on the CPU, numpy's arrays and
        numbers. Python 2's strings are decoded as latin1. Of classes that are not loaded (such as
        OpenMMLab's logs) there is a ``pickle_globals.Opaque``. Of
        safetensors: ``{"model": {name: tensor}, "metadata": {name: str}}``.

    Raises:
        WeightsError: there is no such file, it is of another kind, not whole, or holds something
            else than weights.
    """
    path = os.fspath(path)
    try:
        size = os.stat(path).st_size
        if os.path.isdir(path):
            raise WeightsError(f"{path} is a folder: name the file of weights in it")
        if not os.path.isfile(path):
            raise WeightsError(f"{path} is not a regular file: name a file of weights")
        with open(path, "rb") as file:
            return _load(file, size)
    except WeightsError:
        raise
    except Refusal as error:
        reason = f"{path} is refused: {error}. Use another file; {_TRUST}"
    except Damage as error:
        reason = f"{path} is damaged: {error}. To mend this, {_AGAIN}"
    except FileNotFoundError:
        reason = f"there is no file {path}: correct the path, or download the file"
    except OSError as error:
        reason = f"{path} cannot be read: {error.strerror or error}. Check its permissions"
    except MemoryError:
        reason = f"{path} does not fit into memory: load it where there is more"
    except Exception as error:  # all that readers of pickles, zip and tensors may raise
        lines = str(error).strip().splitlines() or [""]
        what = f"{type(error).__name__}: {lines[0][:200]}".rstrip(": ")
        what = "".join(c if c.isprintable() else "?" for c in what)
        reason = f"{path} is damaged ({what}). To mend this, {_AGAIN}"
    raise WeightsError(reason)


def check_finite(state: Mapping[str, torch.Tensor | np.ndarray], path: str | os.PathLike) -> None:
    """
    Args:
        state: name of a weight -> the weight, of any shape and type; other values are passed over.
        path: of the file, for the message.

    Raises:
        WeightsError: names the first weight that has NaN or infinite elements.
    """
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() and value.element_size() == 1:
                value = value.float()  # torch.isfinite does not know all types of 8 bits
            finite = bool(torch.isfinite(value).all())
        elif isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fc":
            finite = bool(np.isfinite(value).all())
        else:
            continue
        if not finite:
            raise WeightsError(
                f"{path} is refused: its weight {name!r} has elements that are NaN or infinite. "
                "Use a checkpoint from before its training diverged"
            )


def _load(file: BinaryIO, size: int) -> Any:
    head = file.read(512)
    file.seek(0)
    if head[:4] == b"PK\3\4":
        return torch_files.load_zip(file, size)
    if head[:1] == b"\x80" and head[2:].startswith(torch_files.LEGACY_MAGIC):
        return torch_files.load_legacy(file, size)
    if _is_safetensors(head):
        return _load_safetensors(file, size)
    if (other := _other_kind(head)) is not None:
        raise WeightsError(f"{file.name} is not a file of weights: it is {other}")
    window = Window(file, 0, size)
    return PickleMachine(window, pickle_globals.TABLE, pickle_globals.BUILDERS).run()


def _is_safetensors(head: bytes) -> bool:
    """The length of its header in eight bytes, and its header in JSON."""
    return head[8:9] == b"{" and (head[4:8] == bytes(4) or head[0] not in b"\x80(}])c")


def _other_kind(head: bytes) -> str | None:
    """What a file is that is none of the kinds that are read; None if it may be a pickle."""
    if not head:
        return "empty: download or copy it again"
    for magic, kind in _OTHERS.items():
        if head.startswith(magic):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, so the download failed: check its URL"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer to a file of git-lfs: run git lfs pull"
    # A pickle starts with its protocol, or (protocols 0 and 1) with a container.
    if head[0] in b"(}])c" or (head[0] == 0x80 and head[1:2] <= b"\5"):
        return None
    if head.isascii() and b"\0" not in head:
        return "a text (a download that failed?)"
    return "of no known kind; known are torch.save's, pickles of numpy, and safetensors"


_OTHERS = {
    b"\x1f\x8b": "compressed with gzip: unpack it",
    b"BZh": "compressed with bzip2: unpack it",
    b"\xfd7zXZ": "compressed with xz: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it",
    b"PK\5\6": "an empty zip archive: download or copy it again",
    b"\x89HDF": "in HDF5, as Keras writes it; convert it to .safetensors",
    b"\x93NUMPY": "a single array of numpy; write the weights of a model as a dict",
}


def _load_safetensors(file: BinaryIO, size: int) -> dict[str, dict]:
    try:
        from safetensors import safe_open
    except ModuleNotFoundError:
        raise WeightsError(
            f"{file.name} is in safetensors, which is not installed: pip install safetensors"
        ) from None
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _MAX_HEADER):
        raise Damage(f"it declares a header of {length} bytes, of {size} in all")
    with safe_open(file.name, "pt") as content:  # checks the header against the size of the file
        # Copies, as the file may change while the tensors are in use.
        model = {name: content.get_tensor(name).clone() for name in content.keys()}
        return {"model": model, "metadata": content.metadata() or {}}
