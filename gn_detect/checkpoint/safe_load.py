"""Reading a file of weights without running anything in it.

A pickle may name any function and have it called when it is loaded, and what ``torch.save`` writes
is a pickle, too. Here PyTorch's own restricted reader gets what PyTorch wrote, and the rest gets a
``pickle.Unpickler`` that looks names up in a table ("Restricting Globals" in Python's
documentation); arrays of Python objects in an ``.npz`` are refused. A hostile file may still take
much time and memory, but for an ``.npz``, which must not unpack to much more than it is.
"""

from __future__ import annotations

import builtins
import collections
import errno
import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
import safetensors
import torch

from gn_detect.config import ConfigError


class WeightsError(ConfigError):
    """A file of weights that is refused. The message names the file, what is wrong, and the fix."""


class _Refusal(Exception):
    """What a file asks for that weights do not need: the end of a sentence about the file."""


def load_file(path: str | os.PathLike, device: str = "cpu") -> Any:
    """Read a file of weights; nothing in it is run.

    Args:
        path: of what ``torch.save`` wrote, of a pickle of numpy arrays (Detectron2's zoo, Caffe2,
            Detectron), of a safetensors file, or of ``numpy.savez`` (tensorpack). The content tells
            which; the name says nothing.
        device: of the tensors of ``torch.save``; ``"meta"`` to not read their data, which its zip
            files have apart.

    Returns:
        The content: plain containers, numbers and strings, tensors on the CPU, and numpy's numbers
        and arrays (of a subclass). Python 2's strings are decoded as latin1. Of safetensors:
        ``{"model": {name: tensor}, "metadata": {name: str}}``; of ``numpy.savez``:
        ``{name: array}``.

    Raises:
        WeightsError: there is no such file, it is of another kind, not whole, or asks for something
            that weights do not need.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        known = "is a folder or a device" if os.path.exists(path) else "does not exist"
        raise WeightsError(f"{path} {known}: name a file of weights")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, about old files
            head = file.read(512)
            file.seek(0)
            kind = next(k for start, k in _KINDS.items() if re.match(start, head, re.DOTALL))
            if callable(kind):
                return kind(file, device) if kind is _load_torch else kind(file)
        reason = f"is not a file of weights: it is {kind}"
    except _Refusal as error:
        reason = (
            f"is refused: it {error}. Use another file; if you trust it, load it with the code "
            "that wrote it and save its tensors as .safetensors"
        )
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}. Check its permissions and the disk"
        if error.errno == errno.EINVAL:  # it refers to places before its beginning
            reason = "is damaged (truncated?). To mend this, download or copy it again"
    except MemoryError:
        reason = "does not fit into memory: load it where there is more, or download it again"
    except Exception as error:  # all that readers of pickles, zip and tensors may raise
        what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        reason = f"is damaged ({_printable(what)}). To mend this, download or copy it again"
    raise WeightsError(f"{path} {reason}")


def check_finite(state: Mapping[str, torch.Tensor], path: str | os.PathLike) -> None:
    """
    Args:
        state: name of a weight -> the weight, of any shape and type.
        path: of the file, for the message.

    Raises:
        WeightsError: names the first weight that has NaN or infinite elements, or that cannot be
            looked at: a sparse or quantized one, or one without content (of the device "meta").
    """
    for name, value in state.items():
        try:
            if torch.isfinite(value).all():
                continue
            reason = "has elements that are NaN or infinite. Use a checkpoint from before its "
            reason += "training diverged"
        except RuntimeError:
            reason = f"is no plain tensor ({value.dtype}, {value.layout}, on {value.device}). "
            reason += "Save dense tensors of floating-point numbers"
        raise WeightsError(f"{path} is refused: its weight {name!r} {reason}")


def _load_torch(file: BinaryIO, device: str) -> Any:
    try:
        with torch.serialization.safe_globals([(value, name) for name, value in _TABLE.items()]):
            return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise _asks_for(named[1]) from None
        raise _Refusal("holds something else than weights, or is damaged") from None
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise _Refusal("is a TorchScript archive, a program and not weights") from None
        raise


def _load_safetensors(file: BinaryIO) -> dict[str, dict]:
    with safetensors.safe_open(file.name, "pt") as content:
        # Copies, as the file may change while the tensors are in use.
        model = {name: content.get_tensor(name).clone() for name in content.keys()}
        return {"model": model, "metadata": content.metadata() or {}}


def _load_npz(file: BinaryIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        members = {m.filename.removesuffix(".npy"): m for m in archive.filelist}
        size, unpacked = os.fstat(file.fileno()).st_size, sum(m.file_size for m in archive.filelist)
        if unpacked > 16 * size + 2**24:  # trained weights are hardly compressed
            raise _Refusal(f"has {size:,} bytes and unpacks to {unpacked:,}, as no weights do")
        if len(members) < len(archive.filelist):
            raise _Refusal("has two arrays of one name")
        if {m.compress_type for m in members.values()} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise _Refusal("is compressed in another way than NumPy does it")
        return {name: _array(archive.read(m), m.filename) for name, m in members.items()}


def _array(content: bytes, name: str) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise _Refusal(f"has Python objects in {_printable(name)}, not numbers") from None
        raise
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufc":
        raise _Refusal(f"has something else than an array of numbers in {_printable(name)}")
    return array


def _load_pickle(file: BinaryIO) -> Any:
    return _Unpickler(file, encoding="latin1").load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _TABLE:
            raise _asks_for(f"{module}.{name}")
        return _TABLE[f"{module}.{name}"]


def _asks_for(name: str) -> _Refusal:
    return _Refusal(f"asks for {_printable(name)}, which is no part of weights and may be any code")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:200])


class _Dtype:
    """In the place of ``numpy.dtype``, which believes its state: with other flags than its type's,
    numpy would take the bytes of an array for addresses of objects."""

    def __init__(self, code: str, *flags: Any):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1].decode() if isinstance(state[1], bytes) else state[1]

    def array(self, data: bytes | bytearray | str, shape: tuple, order: str = "C") -> np.ndarray:
        """Of ``data``, which is str where Python 2 wrote it."""
        if not re.fullmatch(r"[<>=|][biufc]\d+", f"{self.order}{self.code}"):
            raise _Refusal(f"has an array of {_printable(str(self.code))!r}, not of numbers")
        data = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(data, f"{self.order}{self.code}").reshape(shape, order=order)


class _Array(np.ndarray):
    """In the place of ``numpy.ndarray``, so that its state is looked at."""

    def __new__(cls) -> _Array:
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        array = dtype.array(data, shape)
        super().__setstate__((1, array.shape, array.dtype, bool(fortran), array.tobytes()))

    def __reduce__(self) -> tuple:
        return self.view(np.ndarray).__reduce__()  # to another process: as a plain array


def _encode(text: str, encoding: str) -> bytes:
    """By which protocol 2 pickles bytes; other codecs would be imported."""
    if encoding != "latin1":
        raise _Refusal("encodes something other than bytes")
    return text.encode("latin1")


class _Opaque:
    """In the place of what is not loaded; it stays empty."""

    def __new__(cls, *arguments: Any) -> _Opaque:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


_BUILTINS = "bool bytearray bytes complex dict float frozenset int list set str tuple".split()
_BUILTINS = {name: getattr(builtins, name) for name in _BUILTINS}
_BUILTINS |= {"long": int, "unicode": str, "getattr": _Opaque}  # methods, in OpenMMLab's logs
_NUMPY = {
    "multiarray._reconstruct": lambda cls, shape, code: _Array(),
    "multiarray.scalar": lambda dtype, data: dtype.array(data, ())[()],
    "numeric._frombuffer": lambda data, dtype, shape, order: dtype.array(data, shape, order),
}
# What a file may name -> what it gets. Classes are immutable, or ours with a __setstate__: a file
# may also give a state to a class itself.
_TABLE: dict[str, Any] = {
    **{f"{m}.{n}": kind for m in ("builtins", "__builtin__") for n, kind in _BUILTINS.items()},
    **{f"{core}.{n}": f for core in ("numpy.core", "numpy._core") for n, f in _NUMPY.items()},
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encode,
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": collections.defaultdict,
    "argparse.Namespace": _Opaque,
    "mmengine.config.config.ConfigDict": dict,
    "mmengine.logging.history_buffer.HistoryBuffer": _Opaque,
    "mmengine.logging.message_hub.MessageHub": _Opaque,
}
# How a file starts -> what reads it, or what it is instead; the first that fits.
_KINDS: dict[bytes, Callable[..., Any] | str] = {
    rb".{4}\x00{4}\{": _load_safetensors,  # the length of its header, and the header in JSON
    rb"PK\x03\x04.{26}[ -~]+\.npy(?![ -~]*/)": _load_npz,  # the name of the first member
    rb"PK\x03\x04": _load_torch,
    # The first of five pickles, before PyTorch 1.6: torch.serialization.MAGIC_NUMBER.
    rb"\x80.\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.": _load_torch,
    rb"\x80[\x00-\x05]": _load_pickle,
    rb"\Z": "empty: download or copy it again",
    rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd": "compressed (gzip, bzip2, xz, zstd): unpack it",
    rb"PK": "an empty zip archive, or a part of one: download or copy it again",
    rb".{257}ustar": "a tar archive: unpack it",
    rb"\x89HDF": "in HDF5, as Keras writes it; convert it to .safetensors",
    rb"\x93NUMPY": "a single array of numpy; write the weights of a model as a dict",
    rb"(\xef\xbb\xbf)?\s*<": "a web page, so the download failed: check its URL",
    rb"version https://git-lfs": "a pointer to a file of git-lfs: run git lfs pull",
    rb"[(}\])c]": _load_pickle,  # protocols 0 and 1 start with a container
    rb"[\t\n\r -~]+\Z": "a text (a download that failed?)",
    rb"": "of no known kind; known are torch.save's, pickles and .npz of numpy, and safetensors",
}
