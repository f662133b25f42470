"""Files in order are read as pickle, torch and safetensors read them."""

import argparse
import collections
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from hostile_weights import archive, in_dict, legacy, saved, tensor
from safetensors.torch import save_file
from torch import nn

from gn_detect.checkpoint.safe_load import WeightsError, check_finite, load_file
from gn_detect.checkpoint.safe_load.pickle_globals import Opaque
from gn_detect.engine.prepare import sentence
from gn_detect.engine.trainer import _get_random_state


def assert_same(ours, reference):
    """Same types, values, attributes, and strides."""
    assert type(ours) is type(reference)
    if isinstance(reference, torch.Tensor):
        assert ours.device.type == "cpu" and ours.requires_grad == reference.requires_grad
        assert (ours.dtype, ours.stride()) == (reference.dtype, reference.stride())
        assert torch.equal(ours, reference)
        assert_same(vars(ours), vars(reference))
    elif isinstance(reference, (np.ndarray, np.generic)):
        assert (ours.dtype, ours.strides) == (reference.dtype, reference.strides)
        assert ours.flags.writeable == reference.flags.writeable
        np.testing.assert_array_equal(ours, reference)
    elif isinstance(reference, dict):
        assert list(ours) == list(reference)
        assert_same(list(ours.values()), list(reference.values()))
        if isinstance(reference, collections.OrderedDict):
            assert vars(ours) == vars(reference)
    elif isinstance(reference, (list, tuple)):
        assert len(ours) == len(reference)
        for a, b in zip(ours, reference, strict=True):
            assert_same(a, b)
    else:
        assert ours == reference


def load_bytes(path, content: bytes):
    path.write_bytes(content)
    return load_file(path)


def numpy_content():
    rng = np.random.default_rng(0)
    codes = "?bBhHiIqQefdFD"
    return {
        "model": {code: (9 * rng.standard_normal((2, 3))).astype(code) for code in codes},
        "order": np.asfortranarray(rng.standard_normal((2, 3))),
        "big": np.arange(3, dtype=">f4"),
        "slice": np.arange(12.0).reshape(3, 4)[:, 1:3],
        "empty": np.zeros((0, 3)),
        "zero_dim": np.array(2.0),
        "numbers": [np.float32(1.5), np.int64(3), np.bool_(True), np.float64("nan")],
        "plain": (1, -2, 2**40, 1.5, None, True, False, "é", "\n'\"", b"\xff\0", b"", "", [], ()),
        "ordered": collections.OrderedDict([("b", 1), ("a", [1, (2,)])]),
        "matching_heuristics": True,
        7: {"long": ["x" * 300] * 3, "many": list(range(3000))},
        "values": python_values(),
    }  # fmt: skip


def python_values():
    return {
        "set": [{1, "a", 2.5, None, (1, "b")}, set(), set(range(3000))],
        "frozenset": [frozenset({1, 2}), frozenset(), frozenset()],
        "bytes": [bytearray(b"\0\xff"), bytearray(), bytearray(range(256)) * 300],
        "complex": [1 + 2j, complex("-0"), complex("inf")],
        0.5: 1, -1e300: 2, float("inf"): 3, (3, "a", 0.5, None, b"x"): 4, (): 5,
    }  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
def test_pickle_of_numpy(tmp_path, protocol):
    content = pickle.dumps(numpy_content(), protocol)
    ours = load_bytes(tmp_path / "weights.pth", content)  # the name says nothing
    assert_same(ours, pickle.loads(content, encoding="latin1"))


# What Python 2 wrote for {"blobs": {"w": np.array([1, 2], "f4")}}, with protocols 0 and 2.
PYTHON_2 = [
    rb"""(dp0
S'blobs'
p1
(dp2
S'w\xe9'
p3
cnumpy.core.multiarray
_reconstruct
p4
(cnumpy
ndarray
p5
(I0
tp6
S'b'
p7
tp8
Rp9
(I1
(L2L
tp10
cnumpy
dtype
p11
(S'f4'
p12
I0
I1
tp13
Rp14
(I3
S'<'
p15
NNNI-1
I-1
I0
tp16
bI00
S'\x00\x00\x80?\x00\x00\x00@'
p17
tp18
bss.""",
    b"\x80\x02}q\x01U\x05blobsq\x02}q\x03U\x02w\xe9q\x04cnumpy.core.multiarray\n_reconstruct\nq\x05"
    b"cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x02\x85cnumpy\ndtype\nq\x08U\x02f4"
    b"K\x00K\x01\x87Rq\t(K\x03U\x01<q\nNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x08\x00"
    b"\x00\x00\x00\x00\x80?\x00\x00\x00@tbss.",
]


@pytest.mark.parametrize("content", PYTHON_2, ids=["protocol0", "protocol2"])
def test_pickle_of_python_2(tmp_path, content):
    ours = load_bytes(tmp_path / "weights.pkl", content)
    assert_same(ours, pickle.loads(content, encoding="latin1"))
    assert [a.tolist() for a in ours["blobs"].values()] == [[1, 2]]


def torch_content(dtypes):
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    norms = nn.Sequential(nn.BatchNorm2d(2), FrozenBatchNorm2d(2))
    return {
        "model": {str(t): (9 * torch.randn(2, 3)).to(t) for t in dtypes},
        "shared": [base, base[1:3, ::2], base.t(), base.view(-1)[5]],
        "expanded": torch.ones(3, 1).expand(3, 5),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.ones(2)),
        "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
        "module": nn.DataParallel(norms).state_dict(),
        "extra": [
            torch.float16,
            torch.Size([1, 2]),
            argparse.Namespace(lr=0.1, names=["a"]),
            collections.Counter("aab"),
            np.arange(3.0),
            np.float64(2.5),
            np.dtype("f4"),
        ],
        "plain": (1, 1.5, None, True, "é", b"\xff", [], {}, torch.strided),
        "values": python_values(),
        "noted": [noted(torch.ones(2)), noted(nn.Parameter(torch.ones(2)))],
    }  # fmt: skip


def noted(value):
    value.note = {"source": ["x"], "mean": torch.ones(1)}
    return value


DTYPES = "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"
NEW_DTYPES = "uint16 uint32 uint64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz "
NEW_DTYPES += "float8_e8m0fnu"  # not without zip


@pytest.mark.parametrize(
    "dtypes, legacy", [(f"{DTYPES} {NEW_DTYPES}", False), (DTYPES, True)], ids=["zip", "legacy"]
)
def test_torch(tmp_path, dtypes, legacy):
    path = tmp_path / "weights.pkl"
    path.write_bytes(saved(torch_content(getattr(torch, t) for t in dtypes.split()), legacy=legacy))
    ours = load_file(path)
    reference = torch.load(path, weights_only=False)
    for value in (ours, reference):  # torch.equal does not know float8
        value["model"] = {k: v.view(torch.uint8) for k, v in value["model"].items()}
    assert_same(ours, reference)
    assert ours["module"]._metadata["module.1"] == {"version": 3}
    ours["shared"][0].zero_()
    assert all(not t.any() for t in ours["shared"])


@pytest.mark.parametrize("dtype", NEW_DTYPES.split())
def test_types_that_the_old_format_has_not(tmp_path, dtype):
    content = {"model": torch.ones(2).to(getattr(torch, dtype))}
    with pytest.raises(WeightsError, match="is refused: .* type that PyTorch cannot read without"):
        load_bytes(tmp_path / "weights.pth", saved(content, legacy=True))
    ours = load_bytes(tmp_path / "weights.pth", saved(content))
    check_finite(ours, "x")


@pytest.mark.parametrize("factory", [list, int, float, str, bool, tuple, dict, set])
def test_default_dict_becomes_a_dict(tmp_path, factory):
    """Python 3 writes int as long and str as unicode in protocol 2, which torch.save takes."""
    content = collections.defaultdict(factory, {"a": [1]})
    assert_same(load_bytes(tmp_path / "weights.pth", saved(content)), {"a": [1]})
    for protocol in range(6):
        file = pickle.dumps(content, protocol)
        assert_same(load_bytes(tmp_path / "weights.pkl", file), {"a": [1]})


def test_tied_weights(tmp_path):
    """As often as models tie them; and what is small may be expanded."""
    base = torch.randn(512, 512)
    content = {"a": base, "b": base, "c": base.t(), "d": base.view(-1)}
    content["e"] = torch.ones(1).expand(2**20)
    ours = load_bytes(tmp_path / "weights.pth", saved(content))
    assert_same(ours, content)
    assert ours["a"].data_ptr() == ours["d"].data_ptr()
    content = {f"{i}": base.numpy() for i in range(4)}
    assert_same(load_bytes(tmp_path / "weights.pkl", pickle.dumps(content)), content)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("count, is_loaded", [(7, True), (9, False)])
def test_ties_have_a_bound(tmp_path, count, is_loaded, legacy):
    """Four times the 4 MiB of the file and 16 MiB, in tensors and arrays, as views and as names."""
    base = torch.ones(2**20)
    views = [{f"{i}": base.view(2**i, -1) for i in range(count)}, {"a": [base] * count}]
    for content in views:
        path = tmp_path / "weights"
        path.write_bytes(saved(content, legacy=legacy))
        if is_loaded:
            check_finite(load_file(path), path)
        else:
            with pytest.raises(WeightsError, match="refer to the same data more than 4 times"):
                load_file(path)


@pytest.mark.parametrize("is_legacy", [False, True])
@pytest.mark.parametrize("kind", ["torch\nFloatStorage", "torch.cuda\nFloatStorage"])
def test_torch_of_cuda(tmp_path, kind, is_legacy):
    content = in_dict(tensor(kind=kind, location="cuda:7", legacy=is_legacy))
    data = torch.tensor([1.0, 2, 3, 4]).numpy().tobytes()
    file = legacy(content) if is_legacy else archive(content, {"weights/data/0": data})
    ours = load_bytes(tmp_path / "weights.pth", file)
    assert_same(ours, {"model": torch.tensor([1.0, 2, 3, 4])})


@pytest.mark.parametrize("legacy", [False, True])
def test_state_of_a_run(tmp_path, legacy):
    """All that a checkpoint of ours has beside the weights; it continues the same."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.GroupNorm(1, 2))
    content = {"iteration": 3, "random_state": _get_random_state(), "model": model.state_dict()}
    for optimizer in (
        torch.optim.SGD(model.parameters(), 0.1, 0.9),
        torch.optim.AdamW(model.parameters()),
    ):
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
        model(torch.ones(1, 1, 2, 2)).sum().backward()
        optimizer.step()
        scheduler.step()
        content[type(optimizer).__name__] = [optimizer.state_dict(), scheduler.state_dict()]
    ours = load_bytes(tmp_path / "weights.pth", saved(content, legacy=legacy))
    assert_same(ours, content)


def test_safetensors(tmp_path):
    model = {"a": torch.randn(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    save_file(model, tmp_path / "weights.pth", {"source": "here"})
    ours = load_file(tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_bytes(b"")  # the tensors do not depend on the file
    assert_same(ours, {"model": model, "metadata": {"source": "here"}})
    save_file(model, tmp_path / "weights")
    assert load_file(tmp_path / "weights")["metadata"] == {}


def test_logs_of_openmmlab_are_opaque(tmp_path, monkeypatch):
    """Their classes are not loaded, even where they are installed."""
    name = "mmengine.logging.history_buffer"

    class HistoryBuffer:
        def __init__(self):
            self.log, self.statistics = np.arange(3.0), {"mean": type(self).mean}

        def mean(self):
            pass

        def __setstate__(self, state):
            raise AssertionError("its code ran")

    class ConfigDict(dict):
        def __reduce_ex__(self, protocol):
            return type(self), (dict(self),)

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = name, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = name, "HistoryBuffer.mean"
    ConfigDict.__module__, ConfigDict.__qualname__ = "mmengine.config.config", "ConfigDict"
    modules = {key: types.ModuleType(key) for key in ("mmengine", name, ConfigDict.__module__)}
    modules[name].HistoryBuffer = HistoryBuffer
    modules[ConfigDict.__module__].ConfigDict = ConfigDict
    for key, module in modules.items():
        monkeypatch.setitem(sys.modules, key, module)
    content = {
        "state_dict": {"a": torch.ones(2)},
        "logs": {"loss": HistoryBuffer()},
        "meta": ConfigDict(a=ConfigDict(b=[1])),
    }
    for is_legacy in (False, True):
        ours = load_bytes(tmp_path / "weights.pth", saved(content, legacy=is_legacy))
        assert_same(ours["state_dict"], content["state_dict"])
        assert_same(ours["meta"], {"a": {"b": [1]}})
        buffer = ours["logs"]["loss"]
        assert type(buffer) is Opaque and buffer.state["log"].tolist() == [0, 1, 2]


def test_allowed_globals_of_others_stay(tmp_path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        load_bytes(tmp_path / "weights.pth", saved({}))
        assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_must_be_finite(tmp_path, bad):
    good = {"count": torch.tensor(3), "a": torch.ones(2), "b": np.ones(2), "text": "x"}
    files = {
        "weights.pth": lambda value: saved(value),
        "weights.pkl": lambda value: pickle.dumps({k: np.asarray(v) for k, v in value.items()}),
    }
    for name, dump in files.items():
        path = tmp_path / name
        path.write_bytes(dump({"a": torch.ones(2), "b": torch.ones(2), "n": torch.tensor(3)}))
        check_finite(load_file(path), path)
        wrong = torch.tensor([1, bad], dtype=torch.float16)
        path.write_bytes(dump({"a": torch.ones(2), "b": wrong, "c": wrong}))
        with pytest.raises(WeightsError, match=f"{name} is refused: its weight 'b' has"):
            check_finite(load_file(path), path)
    check_finite(good, "x")
    with pytest.raises(WeightsError, match="weight 'z'"):
        check_finite({**good, "z": torch.tensor(bad, dtype=torch.bfloat16)}, "x")
    check_finite({"8": torch.ones(2).to(torch.float8_e4m3fn)}, "x")
    with pytest.raises(WeightsError, match="weight '8'"):
        check_finite({"8": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)}, "x")


def test_tools_show_the_sentence():
    """Also from another process, of which there is a traceback as text."""
    error = WeightsError("x.pkl is refused: why. Use another file")
    assert sentence(error) == str(error)
    text = f"Traceback ...\n{WeightsError.__module__}.{WeightsError.__name__}: {error}\n"
    assert sentence(Exception(text)) == str(error)
