"""Files in order are read as pickle, torch and safetensors read them; nothing of others is run."""

import argparse
import collections
import io
import pickle
import struct
import sys
import types
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from gn_detect.checkpoint.safe_load import WeightsError, check_finite, load_file
from gn_detect.engine import sentence
from gn_detect.engine.resume import get_random_state


def saved(value, legacy=False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def archive(content: bytes, *members: str) -> bytes:
    """A zip file as torch.save writes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        target.writestr("weights/data.pkl", content)
        for name in ("version", *members):
            target.writestr(f"weights/{name}", "3\n")
    return file.getvalue()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(function: str, *arguments: bytes) -> bytes:
    """The instructions for a call of ``module:name``."""
    return f"c{function}\n".replace(":", "\n").encode() + b"(" + b"".join(arguments) + b"tR"


def in_dict(value: bytes) -> bytes:
    return b"\x80\x02}" + text("model") + value + b"s."


class Gadget:
    """Its pickle makes the file ``canary`` when it is loaded."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (self.canary, "w")


def gadgets(canary: str) -> dict[str, bytes]:
    gadget, code = {"model": Gadget(canary)}, text(f"open({canary!r}, 'w')")
    opened = text(canary) + text("w")
    path = b"(S'" + canary.encode() + b"'\nS'w'\n"
    return {
        **{f"protocol {p}": pickle.dumps(gadget, p) for p in (0, 2, 5)},
        "Python 2": in_dict(call("__builtin__:eval", code)),
        "instance": path + b"iio\nopen\n.",
        "object": b"(cio\nopen\n" + opened + b"o.",
        "stack global": in_dict(text("io") + text("open") + b"\x93(" + opened + b"tR"),
        "attribute": in_dict(
            call("builtins:getattr", b"cio\nStringIO\n", text("__class__")) + b"0"
            + call("io:open", opened)
        ),
        "torch": saved(gadget),
        "torch before 1.6": saved(gadget, legacy=True),
    }  # fmt: skip


@pytest.mark.parametrize("name", gadgets("canary"))
def test_nothing_is_run(name, tmp_path):
    canary = tmp_path / "canary"
    content = gadgets(str(canary))[name]
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(WeightsError, match="is refused: it asks for ") as error:
        load_file(tmp_path / "weights")
    assert not canary.exists() and "\n" not in str(error.value)
    if name.startswith("torch"):  # what trusts the file runs it
        torch.load(tmp_path / "weights", weights_only=False)
    else:
        pickle.loads(content)
    assert canary.exists()


def npz(*members: tuple[str, bytes], method=zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about two of one name
        for name, content in members:
            target.writestr(name, content)
    return file.getvalue()


def npy(value, **kwargs) -> bytes:
    file = io.BytesIO()
    np.save(file, value, **kwargs)
    return file.getvalue()


W = ("conv0/W.npy", npy(np.ones(3, "f4")))


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("kind", ["array of objects", "pickle"])
def test_nothing_in_an_npz_is_run(kind, at, tmp_path):
    canary = tmp_path / "canary"
    gadget = np.array([Gadget(str(canary))], object)
    content = npy(gadget) if kind == "array of objects" else pickle.dumps(gadget)
    members = [W, W]
    members[at] = ("group0/W.npy", content)
    path = tmp_path / "weights.npz"
    path.write_bytes(npz(*members))
    message = f"{path} is refused: it has Python objects in group0/W.npy, not numbers. Use another"
    with pytest.raises(WeightsError, match=message):
        load_file(path)
    assert not canary.exists()
    if kind == "pickle":  # what trusts the file runs it
        pickle.loads(content)
    else:
        np.load(path, allow_pickle=True)["group0/W"]
    assert canary.exists()


def header(text: str, size: int = 8) -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + bytes(size)


SHAPE = "{'descr': '<f4', 'fortran_order': False, 'shape': %s}\n"
# A size of 1 in the directory of the file, in place of its own.
LIAR = npz(W).replace(struct.pack("<I", len(W[1])) + struct.pack("<H", 11), b"\1\0\0\0\x0b\0")


@pytest.mark.parametrize(
    "content, message",
    [
        (npz(W, ("b.npy", npy(np.zeros(2**25, "u1")))), "bytes and unpacks to 33,554,.*, as no we"),
        (npz(*[(f"{i}.npy", bytes(2**20)) for i in range(17)]), "unpacks to 17,825,792, as no"),
        (LIAR, "is damaged .*copy it again"),
        (npz(W, ("a.npy", header(SHAPE % "(2**20,)"))), "is damaged .ValueError"),
        (npz(W, ("a.npy", header(SHAPE % f"({2**60},)"))), "memory|is damaged .ValueError"),
        (npz(W, ("a.npy", header(SHAPE % f"({2**32}, {2**32})"))), "is damaged .ValueError"),
        (npz(W, ("a.npy", header(SHAPE % "(-1,)"))), "is damaged .ValueError"),
        (npz(W, ("a.npy", header(SHAPE % "open('canary', 'w')"))), "is damaged .ValueError"),
        (npz(W, ("a.npy", header("(" * 9000))), "is damaged"),
        (npz(W, ("a.npy", b"hello")), "has Python objects in a.npy"),
        (npz(W, ("a.npy", b"")), "is damaged .EOFError"),
        (npz(W, ("a.npy", npz(W))), "has something else than an array of numbers in a.npy"),
        (npz(W, ("a.npy", npy(np.array(["a"])))), "else than an array of numbers in a.npy"),
        (npz(W, ("a.npy", npy(np.zeros(2, "f4,i4")))), "else than an array of numbers in a.npy"),
        (npz(W, ("a.npy", npy(np.zeros(2, "V0")))), "else than an array of numbers in a.npy"),
        (npz(W, W), "has two arrays of one name"),
        (npz(W, (W[0].removesuffix(".npy"), W[1])), "has two arrays of one name"),
        (npz(W, method=zipfile.ZIP_LZMA), "compressed in another way"),
        (npz(W)[:-30], "is damaged .BadZipFile"),
        (npz(W).replace(b"conv0/W.npy", b"conv0/W.npx"), "is damaged|is refused"),
    ],
)
def test_hostile_npz(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(WeightsError, match=f"weights .*{message}") as error:
        load_file(tmp_path / "weights")
    assert "\n" not in str(error.value) and not (tmp_path / "canary").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save, tmp_path):
    """Of the names that TensorFlow gives."""
    content = {
        "conv0/W:0": np.random.default_rng(0).standard_normal((3, 2)).astype("f4"),
        "conv0/gn/beta": np.zeros(2**16, "f4"),
        "order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "step": np.array(3),
    }
    save(tmp_path / "x.npy.npz", **content)
    path = tmp_path / "x.npy.npz"
    assert_same(load_file(path), content)
    whole = path.read_bytes()
    for part in (0.2, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(WeightsError, match=f"^{path} is damaged .*copy it again$"):
            load_file(path)


def test_a_torch_file_in_a_folder_like_an_array(tmp_path):
    """PyTorch calls the folder in its archive as the file."""
    torch.save({"model": STATE_DICT}, tmp_path / "x.npy.pth")
    assert b"x.npy/" in (tmp_path / "x.npy.pth").read_bytes()
    assert_same(load_file(tmp_path / "x.npy.pth")["model"], STATE_DICT)


EMPTY = call("numpy.core.multiarray:_reconstruct", b"cnumpy\nndarray\n", b"K\0\x85", text("b"))
STATE = b"(K\3" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"  # without flags


def array(code: str, shape: bytes, state: bytes = STATE) -> bytes:
    dtype = call("numpy:dtype", text(code), b"\x89", b"\x88") + state
    return in_dict(EMPTY + b"(K\1" + shape + b"\x85" + dtype + b"\x89" + text("A" * 16) + b"tb")


@pytest.mark.parametrize(
    "content, message",
    [
        # numpy's own __setstate__ takes the bytes for two addresses.
        (array("O8", b"K\2"), "has an array of 'O8', not of numbers"),
        (pickle.dumps(np.array([1, "a"], object), 2), "has an array of 'O8'"),
        (pickle.dumps(np.zeros(2, "f4,i4"), 4), "has an array of 'V8'"),
        (array("f4", b"K\5"), "is damaged .ValueError: cannot reshape"),
        (in_dict(call("numpy:ndarray", b"K\2\x85")), "is damaged .TypeError"),
        (in_dict(call("numpy.core.multiarray:scalar", text("O8"), b"N")), "is damaged"),
        (in_dict(call("_codecs:encode", text("a"), text("rot13"))), "encodes something other"),
        (in_dict(text("collections") + text("OrderedDict.fromkeys") + b"\x93"), "asks for collec"),
        (in_dict(text("storage") + b"Q"), "is damaged .UnpicklingError"),
        (archive(in_dict(text("storage") + b"Q")), "holds something else than weights, or is dam"),
        (archive(in_dict(b"N"), "constants.pkl"), "is a TorchScript archive, a program"),
        (pickle.dumps({"model": torch.zeros(2)}, 2), "asks for torch._utils._rebuild_tensor_v2"),
    ],
)
def test_what_weights_do_not_have(content, message, tmp_path):
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(WeightsError, match=f"weights .*{message}"):
        load_file(tmp_path / "weights")


@pytest.mark.parametrize("cls", [collections.OrderedDict, np.ndarray, np.dtype, argparse.Namespace])
def test_classes_are_not_changed(cls, tmp_path):
    """A state may be given to a class as well as to an object."""
    name = f"c{cls.__module__}\n{cls.__name__}\n".encode()
    (tmp_path / "weights").write_bytes(b"\x80\2" + name + b"N}" + text("x") + b"K\1s\x86b.")
    with pytest.raises(WeightsError, match="is damaged"):
        load_file(tmp_path / "weights")
    (tmp_path / "weights").write_bytes(b"\x80\2" + name + b".")
    assert not hasattr(load_file(tmp_path / "weights"), "x")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "weights is not a file of weights: it is empty"),
        (b"<!DOCTYPE html>\n<html>404</html>", "a web page, so the download failed: check its URL"),
        (b"\n\n<?xml version='1.0'?>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs: run git lfs pull"),
        (b'{"message": "Not Found"}', "a text .a download that failed"),
        (b"\x1f\x8b\x08" + bytes(20), "compressed .gzip"),
        (b"PK\5\6" + bytes(18), "an empty zip archive"),
        (bytes(257) + b"ustar" + bytes(99), "a tar archive: unpack it"),
        (b"\x93NUMPY\1\0" + bytes(20), "a single array of numpy"),
        (b"\x89HDF\r\n", "in HDF5"),
        (b"\x7fELF" + bytes(100), "of no known kind"),
        (b"\x80\x09}.", "of no known kind"),
    ],
)
def test_what_a_file_is_instead(content, message, tmp_path):
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        load_file(tmp_path / "weights")


@pytest.mark.parametrize(
    "name, message", [("absent.pth", "absent.pth does not exist"), ("", "is a folder or a device")]
)
def test_what_is_no_file(name, message, tmp_path):
    with pytest.raises(WeightsError, match=f"{message}: name a file of weights"):
        load_file(tmp_path / name)


STATE_DICT = {f"conv{i}.weight": torch.randn(3, 5) for i in range(4)}
ARRAYS = {name: tensor.numpy() for name, tensor in STATE_DICT.items()}
FILES = {
    **{f"protocol {p}": pickle.dumps({"model": ARRAYS}, p) for p in (0, 2, 4, 5)},
    "zip": saved({"model": STATE_DICT, "iteration": 3}),
    "legacy": saved({"model": STATE_DICT, "iteration": 3}, legacy=True),
    "safetensors": safetensors.torch.save(STATE_DICT, {"source": "test"}),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_truncated_file(content, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(content)
    assert load_file(path)["model"].keys() == STATE_DICT.keys()
    for size in [12, *(len(content) * n // 10 for n in (2, 4, 6, 8, 9)), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(WeightsError, match=f"^{path} is (damaged .*copy it again$|refused: )"):
            load_file(path)


def assert_same(ours, reference):
    """Same types, values and attributes; arrays may be of a subclass."""
    if isinstance(reference, torch.Tensor):
        assert ours.device.type == "cpu" and ours.requires_grad == reference.requires_grad
        assert ours.dtype == reference.dtype and torch.equal(ours, reference)
        return
    if isinstance(reference, np.ndarray):
        assert (ours.dtype, ours.strides) == (reference.dtype, reference.strides)
    else:
        assert type(ours) is type(reference)
    if isinstance(reference, dict):
        assert list(ours) == list(reference)
        assert getattr(ours, "__dict__", {}) == getattr(reference, "__dict__", {})
        ours, reference = list(ours.values()), list(reference.values())
    if isinstance(reference, (list, tuple)):
        for a, b in zip(ours, reference, strict=True):
            assert_same(a, b)
    else:
        np.testing.assert_array_equal(ours, reference)  # NaN is equal to NaN


def numpy_content():
    rng = np.random.default_rng(0)
    return {
        "model": {c: (9 * rng.standard_normal((2, 3))).astype(c) for c in "?bBhHiIqQefdgFD"},
        "order": np.asfortranarray(rng.standard_normal((2, 3))),
        "big": np.arange(3, dtype=">f4"),
        "slice": np.arange(12.0).reshape(3, 4)[:, 1:3],
        "empty": [np.zeros((0, 3)), np.array(2.0)],
        "numbers": [np.float32(1.5), np.int64(3), np.bool_(True), np.float64("nan")],
        "plain": (1, -2, 2**40, 1.5, None, True, "é", b"\xff\0", b"", "", [], (), 1 + 2j),
        "sets": [{1, "a"}, set(), frozenset({1, 2}), bytearray(b"\0\xff"), bytearray()],
        "ordered": collections.OrderedDict([("b", 1), ("a", [1, (2,)])]),
        "default": [collections.defaultdict(kind, {"a": [1]}) for kind in (list, int, str, dict)],
        "__author__": "Detectron2",
    }


@pytest.mark.parametrize("core", [b"numpy._core", b"numpy.core"])
@pytest.mark.parametrize("protocol", range(6))
def test_pickle_of_numpy(protocol, core, tmp_path):
    """Detectron2's zoo has protocols 2 and 4, and the names of NumPy 1."""
    content = pickle.dumps(numpy_content(), protocol)
    changed = content.replace(b"numpy._core", core) if protocol < 4 else content
    (tmp_path / "weights.pth").write_bytes(changed)
    assert_same(load_file(tmp_path / "weights.pth"), pickle.loads(content))


# What Python 2 wrote for {"blobs": {"w\xe9": np.array([1, 2], "f4")}}, with protocols 0 and 2.
PYTHON_2 = [
    b"(dp0\nS'blobs'\np1\n(dp2\nS'w\\xe9'\np3\ncnumpy.core.multiarray\n_reconstruct\np4\n(cnumpy\n"
    b"ndarray\np5\n(I0\ntp6\nS'b'\np7\ntp8\nRp9\n(I1\n(L2L\ntp10\ncnumpy\ndtype\np11\n(S'f4'\np12\n"
    b"I0\nI1\ntp13\nRp14\n(I3\nS'<'\np15\nNNNI-1\nI-1\nI0\ntp16\nbI00\n"
    b"S'\\x00\\x00\\x80?\\x00\\x00\\x00@'\np17\ntp18\nbss.",
    b"\x80\x02}q\x01U\x05blobsq\x02}q\x03U\x02w\xe9q\x04cnumpy.core.multiarray\n_reconstruct\nq\x05"
    b"cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x02\x85cnumpy\ndtype\nq\x08U\x02f4"
    b"K\x00K\x01\x87Rq\t(K\x03U\x01<q\nNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x08\x00"
    b"\x00\x00\x00\x00\x80?\x00\x00\x00@tbss.",
]


@pytest.mark.parametrize("content", PYTHON_2, ids=["protocol0", "protocol2"])
def test_pickle_of_python_2(content, tmp_path):
    """As Caffe2's files are."""
    (tmp_path / "weights.pkl").write_bytes(content)
    ours = load_file(tmp_path / "weights.pkl")
    assert_same(ours, {"blobs": {"w\xe9": np.array([1, 2], "f4")}})


@pytest.mark.parametrize("legacy", [False, True])
def test_torch(legacy, tmp_path):
    """All that a checkpoint of ours has beside the weights, and what others have."""
    base = torch.randn(4, 6)
    model = nn.DataParallel(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    content = {
        "model": model.state_dict(),
        "types": [base.to(kind) for kind in (torch.float16, torch.bfloat16, torch.int64)],
        "shared": [base, base[1:3, ::2], base.t(), base.view(-1)[5]],
        "parameter": nn.Parameter(torch.ones(2)),
        "numpy": [np.arange(3.0), np.float64(2.5), np.asfortranarray(base.numpy())],
        "containers": [collections.Counter("aab"), collections.defaultdict(list), torch.Size([1])],
        "random_state": get_random_state(),
    }
    for optimizer in (
        torch.optim.SGD(model.parameters(), 0.1, 0.9),
        torch.optim.AdamW(model.parameters()),
    ):
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
        model(torch.ones(2, 1, 2, 2)).sum().backward()
        optimizer.step()
        scheduler.step()
        content[type(optimizer).__name__] = [optimizer.state_dict(), scheduler.state_dict()]
    path = tmp_path / "weights.pth.tar"
    path.write_bytes(saved({**content, "args": argparse.Namespace(lr=0.1)}, legacy))
    ours = load_file(path)
    del ours["args"]  # which is not loaded
    assert_same(ours, content)
    ours["shared"][0].zero_()
    assert all(not t.any() for t in ours["shared"])


def test_safetensors(tmp_path):
    model = {"a": torch.randn(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    safetensors.torch.save_file(model, tmp_path / "weights.pth", {"source": "here"})
    ours = load_file(tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_bytes(b"")  # the tensors do not depend on the file
    assert_same(ours, {"model": model, "metadata": {"source": "here"}})
    safetensors.torch.save_file(model, tmp_path / "weights")
    assert load_file(tmp_path / "weights")["metadata"] == {}


@pytest.mark.parametrize("legacy", [False, True])
def test_logs_of_openmmlab_are_not_loaded(legacy, tmp_path, monkeypatch):
    """Not even where their classes are installed."""

    class HistoryBuffer:
        def __init__(self):
            self.statistics = {"mean": type(self).mean}

        def mean(self):
            pass

        def __setstate__(self, state):
            raise AssertionError("its code ran")

    class ConfigDict(dict):
        def __reduce_ex__(self, protocol):
            return type(self), (dict(self),)

    HistoryBuffer.__qualname__, ConfigDict.__qualname__ = "HistoryBuffer", "ConfigDict"
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.__module__ = HistoryBuffer.mean.__module__ = "mmengine.logging.history_buffer"
    ConfigDict.__module__ = "mmengine.config.config"
    for cls in (HistoryBuffer, ConfigDict):
        module = types.SimpleNamespace(**{cls.__name__: cls})
        monkeypatch.setitem(sys.modules, cls.__module__, module)
    monkeypatch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
    content = {
        "state_dict": STATE_DICT,
        "meta": ConfigDict(a=ConfigDict(b=[1])),
        "logs": {"loss": HistoryBuffer()},
    }
    (tmp_path / "weights.pth").write_bytes(saved(content, legacy))
    ours = load_file(tmp_path / "weights.pth")
    assert_same(ours["state_dict"], STATE_DICT)
    assert ours["meta"] == {"a": {"b": [1]}} and not vars(ours["logs"]["loss"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float8_e5m2])
def test_weights_must_be_finite(bad, kind):
    good = {"count": torch.tensor(3), "a": torch.ones(2).to(kind)}
    check_finite(good, "x")
    with pytest.raises(WeightsError, match="x.pth is refused: its weight 'b' has elements that"):
        check_finite({**good, "b": torch.tensor([1, bad]).to(kind), "c": good["a"]}, "x.pth")


@pytest.mark.parametrize("tensor", [torch.zeros(2, device="meta"), torch.eye(3).to_sparse()])
def test_weights_must_be_plain(tensor):
    with pytest.raises(WeightsError, match="its weight 'a' is no plain tensor .torch.float32"):
        check_finite({"a": tensor}, "x.pth")


def test_tools_show_the_sentence():
    """Also from another process, of which there is a traceback as text."""
    error = WeightsError("x.pkl is refused: why. Use another file")
    assert sentence(error) == str(error)
    text = f"Traceback ...\n{WeightsError.__module__}.{WeightsError.__name__}: {error}\n"
    assert sentence(Exception(text)) == str(error)
