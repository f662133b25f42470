"""Files that look like weights and are not: what a loader that trusts them would run or allocate.

Each is written by hand, or by the format's own writer and then changed. ``write`` returns their
names; tests/checkpoint/test_safe_load_attacks.py loads them.
"""

import collections
import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch

DEEP = 1_000_000
HUGE = 2**40


class Gadget:
    """Its pickle runs ``touch <canary>`` when it is loaded."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def write(folder: Path, canary: Path) -> None:
    """Write all files into ``folder``; those that run code make the file ``canary``."""
    groups = [pickles(canary), repeats(), arrays(), archives(canary), tensors(canary)]
    groups += [repeated_tensors(), others(), cut()]
    for group in groups:
        for name, content in group.items():
            assert not (folder / name).exists(), name
            (folder / name).write_bytes(content)
    (folder / "folder").mkdir()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def in_dict(value: bytes) -> bytes:
    """A pickle of {"model": value}"""
    return b"\x80\x02}" + text("model") + value + b"s."


def pickles(canary: Path) -> dict[str, bytes]:
    gadget, touch = {"model": Gadget(canary)}, f"touch {canary}"
    code = text(f"open({str(canary)!r}, 'w')")
    files = {f"reduce_{p}.pkl": pickle.dumps(gadget, p) for p in (0, 1, 2, 3, 4, 5)}
    # A double memo: every tuple holds the one before twice.
    doubled = b")q\0" + b"h\0\x86q\0" * 60
    ordered_dict = b"ccollections\nOrderedDict\n)R"
    files |= {
        "eval.pkl": in_dict(call("builtins", "eval", code)),
        "exec_python2.pkl": in_dict(call("__builtin__", "exec", code)),
        "getattr.pkl": in_dict(call("builtins", "getattr", b"cos\npath\n", text("join"))),
        "stack_global.pkl": in_dict(
            text("subprocess") + text("call") + b"\x93" + b"]" + text("touch") + b"a\x85R"
        ),
        "dotted_global.pkl": in_dict(
            text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93"
        ),
        "inst.pkl": b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "obj.pkl": b"(cos\nsystem\n" + text(touch) + b"o.",
        "newobj.pkl": in_dict(b"csubprocess\nPopen\n" + text(touch) + b"\x85\x81"),
        "newobj_ex.pkl": in_dict(b"cargparse\nNamespace\n)}\x92"),
        "copyreg.pkl": in_dict(
            call("copy_reg", "_reconstructor", b"ccollections\nOrderedDict\n", b"N", b"N")
        ),
        "numpy_load.pkl": in_dict(call("numpy", "load", text("x.npy"))),
        "numpy_exec.pkl": in_dict(call("numpy.f2py.crackfortran", "myeval", code)),
        "torch_in_pickle.pkl": pickle.dumps({"model": torch.zeros(2)}, 2),
        "ext1.pkl": in_dict(b"\x82\x01"),
        "ext4.pkl": in_dict(b"\x84\x01\0\0\0"),
        "persid.pkl": b"Psomething\n.",
        "binpersid.pkl": in_dict(text("something") + b"Q"),
        "buffer.pkl": in_dict(b"\x97"),
        "global_as_value.pkl": in_dict(b"ccollections\nOrderedDict\n"),
        "global_alone.pkl": b"ccollections\nOrderedDict\n.",
        "build_ordered_dict.pkl": in_dict(ordered_dict + b"}" + text("items") + b"K\1sb"),
        "build_setstate.pkl": in_dict(
            b"cargparse\nNamespace\n)\x81}" + text("__setstate__") + b"K\1sb}b"
        ),
        "build_class.pkl": in_dict(b"ccollections\nOrderedDict\n}" + text("x") + b"K\1sb"),
        "build_slots.pkl": in_dict(
            b"cargparse\nNamespace\n)\x81N}" + text("__class__") + b"K\1s\x86b"
        ),
        "holds_itself.pkl": b"\x80\2]q\0h\0a.",
        "holds_itself_late.pkl": b"\x80\2]q\0(h\0ta.",
        "deep_tuples.pkl": b"\x80\2)" + b"\x85" * DEEP + b".",
        "deep_lists.pkl": b"\x80\2" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
        "deep_dicts.pkl": b"\x80\2" + b"}K\0" * DEEP + b"N" + b"s" * DEEP + b".",
        "deep_text.pkl": b"(" * DEEP + b"l" * DEEP + b".",
        "deep_late.pkl": b"\x80\2"  # every list is put into the one before when that is in use
        + b"".join(b"]r" + struct.pack("<I", i) for i in range(1000))
        + b"".join(
            b"j" + struct.pack("<I", i) + b"j" + struct.pack("<I", i + 1) + b"a"
            for i in range(999)
        )
        + b"j\0\0\0\0.",
        "memo_bomb.pkl": b"\x80\2" + doubled + b".",
        "memo_bomb_as_key.pkl": b"\x80\2}" + doubled[: 3 + 5 * 20] + b"Ns.",
        "colliding_keys.pkl": b"\x80\2}("
        + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(1, 60_000))
        + b"u.",
        "memo_index.pkl": b"\x80\2]r\xff\xff\xff\xff" + b"cos\nsystem\n.",
        "long_string.pkl": b"\x80\4\x8d" + struct.pack("<Q", HUGE) + b"x.",
        "long_integer.pkl": b"\x80\2\x8b" + struct.pack("<I", 2**20) + b"\x7f" * 2**20 + b".",
        "many_digits.pkl": b"I" + b"9" * 2**22 + b"\n.",
        "copies.pkl": b"\x80\2(" + text("x" * 2**20) + b"q\0" + text("latin1") + b"q\1"
        b"c_codecs\nencode\nq\2" + b"h\2h\0h\1\x86R" * 4000 + b"l.",
        "instructions.pkl": b"\x80\2(" + b"K\1" * 3 * DEEP + b"l.",
    }  # fmt: skip
    return files


def repeats() -> dict[str, bytes]:
    """Small pickles that copy a long list, mapping or tuple again and again, and their like."""
    pairs = b"](" + b"".join(number(i) + b"N\x86" for i in range(10_000)) + b"e\x85q\0"
    mapping = b"}(" + b"".join(number(i) + b"N" for i in range(10_000)) + b"uq\0\x85q\1"
    numbers = b"](" + b"".join(number(i) for i in range(10_000)) + b"e\x85q\0"
    many = b"(" + number(2**100) * 10_000 + b"tq\0"
    history = b"cmmengine.logging.history_buffer\nHistoryBuffer\n"
    namespace = b"cargparse\nNamespace\n)\x81"
    names = b"}(" + b"".join(text(f"a{i}") + b"N" for i in range(10_000)) + b"uq\0"
    unbuilt = call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\n", b"K\0\x85C\1b")
    numpy_4 = b"(K\1K\1\x85" + number_type("f4") + b"\x89C\4" + bytes(4) + b"tb"
    calls = {
        "ordered_dict": (pairs, b"ccollections\nOrderedDict\n"),
        "dict": (mapping, b"c__builtin__\ndict\n"),
        "counter": (mapping, b"ccollections\nCounter\n"),
        "config": (mapping, b"cmmengine.config.config\nConfigDict\n"),
        "set": (numbers, b"c__builtin__\nset\n"),
        "frozenset": (numbers, b"c__builtin__\nfrozenset\n"),
        "arguments": (many, history),
    }
    files = {}
    for name, (argument, function) in calls.items():
        again = b"h\2h\1R" if b"q\1" in argument[-4:] else b"h\2h\0R"
        start = b"\x80\2(" + argument + function + b"q\2"
        files[f"repeat_{name}.pkl"] = start + again * 100_000 + b"l."
        # Without a list, the copies are left below what the pickle returns.
        files[f"repeat_{name}_left.pkl"] = b"\x80\2" + start[3:] + again * 3000 + b"."
    return {
        **files,
        "repeat_namespace.pkl": b"\x80\2(" + names + (namespace + b"h\0b") * 20_000 + b"l.",
        "left.pkl": b"\x80\2NN.",
        "left_mark.pkl": b"\x80\2N(N.",
        "many_sizes.pkl": in_dict(
            unbuilt + b"(K\1" + many + number_type("f4") + b"\x89C\4" + bytes(4) + b"tb"
        ),
        "many_tuple_keys.pkl": b"\x80\2}("
        + b"".join(number(i) + b"N\x86N" for i in range(2000))
        + b"u.",
        "set_of_list.pkl": b"\x80\4\x8f(]\x90.",
        "set_of_text.pkl": in_dict(call("builtins", "set", text("abc"))),
        "set_items_of_list.pkl": b"\x80\4](N\x90.",
        "tuple_of_list_as_key.pkl": b"\x80\2}]\x85Ns.",
        "complex_key.pkl": b"\x80\2}"
        + call("builtins", "complex", pickle.dumps(1.0, 2)[2:-1] * 2)
        + b"Ns.",
        "bytearray_size.pkl": in_dict(call("builtins", "bytearray", number(HUGE))),
        "bytearray_copies.pkl": b"\x80\3(B" + struct.pack("<I", 2**20) + bytes(2**20)
        + b"\x85q\0c__builtin__\nbytearray\nq\1" + b"h\1h\0R" * 4000 + b"l.",
        "complex_of_text.pkl": in_dict(call("builtins", "complex", text("1" * 1000), text("j"))),
        "holds_itself_opaque.pkl": b"\x80\2(]q\0" + history + b")\x81q\1ah\1h\0bt.",
        "holds_itself_namespace.pkl": b"\x80\2(]q\0" + namespace + b"q\1ah\1}"
        + text("a") + b"h\0sbt.",
        "unbuilt_array.pkl": b"\x80\2](" + unbuilt + b"q\0\x85h\0" + numpy_4 + b"e.",
    }  # fmt: skip


def arrays() -> dict[str, bytes]:
    """Pickles of numpy arrays, protocol 2."""
    ndarray, f4 = b"cnumpy\nndarray\n", number_type("f4")
    empty = call("numpy.core.multiarray", "_reconstruct", ndarray, b"K\0\x85", b"C\1b")

    def array(*state: bytes) -> bytes:
        return in_dict(empty + b"(" + b"".join(state) + b"tb")

    data = b"C\x08" + bytes(8)
    long = b"B" + struct.pack("<I", 2**20) + bytes(2**20) + b"q\1"
    state = b"K\1" + number(2**18) + b"\x85", f4, b"\x89", long
    named = b"".join(text(f"w{i}") + b"h\0" for i in range(50_000))
    shared = call(
        "numpy.core.numeric", "_frombuffer", b"h\1", f4, number(2**18) + b"\x85", text("C")
    )
    return {
        "array_named_again.pkl": b"\x80\2}("
        + text("w") + empty + b"(" + b"".join(state) + b"tbq\0" + named + b"u.",
        "array_shares_bytes.pkl": b"\x80\3](" + long + shared * 1000 + b"e.",
        "array_huge.pkl": array(b"K\1", number(HUGE) + b"\x85", f4, b"\x89", data),
        "array_overflow.pkl": array(b"K\1", number(2**62) * 2 + b"\x86", f4, b"\x89", data),
        "array_negative.pkl": array(b"K\1", number(-2) * 2 + b"\x86", f4, b"\x89", data),
        "array_short.pkl": array(b"K\1", number(3) + b"\x85", f4, b"\x89", data),
        "array_of_list.pkl": array(b"K\1", number(2) + b"\x85", f4, b"\x89", b"](NNe"),
        "array_fresh_huge.pkl": in_dict(
            call("numpy.core.multiarray", "_reconstruct", ndarray, number(HUGE) + b"\x85", b"C\1b")
        ),
        "array_of_class.pkl": in_dict(
            call("numpy._core.multiarray", "_reconstruct", b"cos\nsystem\n", b"K\0\x85", b"C\1b")
        ),
        "array_call.pkl": in_dict(call("numpy", "ndarray", number(HUGE) + b"\x85")),
        "array_state_twice.pkl": array(b"K\1", number(2) + b"\x85", f4, b"\x89", data)[:-2]
        + b"(K\1" + number(2) + b"\x85" + f4 + b"\x89" + data + b"tbs.",
        "array_objects.pkl": pickle.dumps({"model": np.array([1, "a"], dtype=object)}, 2),
        "array_fields.pkl": pickle.dumps({"model": np.zeros(2, dtype="f4,i4")}, 4),
        "array_text.pkl": pickle.dumps({"model": np.array(["a"])}, 2),
        "array_frombuffer.pkl": in_dict(
            call("numpy.core.numeric", "_frombuffer", data, f4, number(HUGE) + b"\x85", text("C"))
        ),
        "dtype_objects.pkl": in_dict(call("numpy", "dtype", text("O8"), b"\x89", b"\x88")),
        "dtype_state.pkl": in_dict(
            call("numpy", "dtype", text("f4"), b"\x89", b"\x88")
            + b"(K\3" + text("|") + b"NN}" + number(HUGE) + b"K\1K?tb"
        ),
        "scalar_of_objects.pkl": in_dict(
            call("numpy.core.multiarray", "scalar", text("O8"), b"N")
        ),
        "scalar_short.pkl": in_dict(call("numpy.core.multiarray", "scalar", f4, b"C\2ab")),
    }  # fmt: skip


def number_type(code: str) -> bytes:
    state = b"(K\3" + text("<") + b"NNN" + number(-1) * 2 + b"K\0tb"
    return call("numpy", "dtype", text(code), b"\x89", b"\x88") + state


def archive(content: bytes, members=None, *, root="weights", compression=zipfile.ZIP_STORED):
    """As torch.save writes it; ``members``: name (or ZipInfo) -> bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        target.writestr(f"{root}/data.pkl", content)
        target.writestr(f"{root}/version", "3\n")
        for name, data in (members or {}).items():
            target.writestr(name, data)
    return file.getvalue()


def saved(value, *, legacy=False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def archives(canary: Path) -> dict[str, bytes]:
    empty = pickle.dumps({"model": {}}, 2)
    link = zipfile.ZipInfo("weights/data/0")
    link.external_attr = 0o120777 << 16
    twice = archive(empty, {"weights/data/0": b"good", "weights/data/1": b"evil"})
    good = saved({"model": {"a": torch.ones(4)}})
    end = good.rindex(b"PK\5\6")
    encrypted = bytearray(archive(empty))
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1
    inner = archive(empty, {"weights/data/1": bytes(8)})
    inner = inner[inner.index(b"PK\3\4", inner.index(b"3\n")) :][:52]  # data/1 with its header
    overlapping = bytearray(archive(empty, {"weights/data/0": inner, "weights/data/1": bytes(8)}))
    entry = overlapping.rindex(b"PK\1\2")
    overlapping[entry + 42 : entry + 46] = struct.pack("<I", overlapping.index(inner))
    files = {
        "parent.pth": {"weights/../../x": b"x"},
        "parent_of_root.pth": {"../x": b"x"},
        "absolute.pth": {"/etc/x": b"x"},
        "backslash.pth": {"weights/data\\x": b"x"},
        "drive.pth": {"C:/x": b"x"},
        "link.pth": {link: b"/etc/passwd"},
        "second_root.pth": {"other/data/0": b"x"},
        "nested.pth": {"weights/inner.zip": archive(empty)},
        "script.pth": {"weights/constants.pkl": empty, "weights/code/x.py": b""},
        "extra.pth": {"weights/setup.py": b""},
        "case.pth": {"weights/data/a": bytes(4096), "weights/data/A": b""},
    }
    return {
        **{name: archive(empty, members) for name, members in files.items()},
        "twice.pth": twice.replace(b"weights/data/1", b"weights/data/0"),
        "bomb.pth": archive(
            empty, {"weights/data/0": bytes(2**26)}, compression=zipfile.ZIP_DEFLATED
        ),
        "encrypted.pth": bytes(encrypted),
        "overlapping.pth": bytes(overlapping),
        "before.pth": b"PK\3\4" + good,
        "after.pth": good + b"x",
        "comment.pth": good[: end + 20] + b"\4\0" + b"evil",
        "second_end.pth": good[: end + 8] + b"\1\0\1\0" + good[end + 12 :],
        "no_pickle.pth": archive(empty).replace(b"data.pkl", b"data/pkl"),
        "empty.pth": b"PK\5\6" + bytes(18),
    }  # fmt: skip


def tensor(
    *,
    kind="torch\nFloatStorage",
    key="0",
    location="cpu",
    numel=4,
    offset=0,
    size=(4,),
    stride=(1,),
    hooks=b"ccollections\nOrderedDict\n)R",
    legacy=False,
) -> bytes:
    """The instructions for a tensor as torch.save writes it."""
    identity = b"(" + text("storage") + f"c{kind}\n".encode() + text(key) + text(location)
    identity += number(numel) + (b"N" if legacy else b"") + b"tQ"
    sizes = [b"(" + b"".join(map(number, n)) + b"t" for n in (size, stride)]
    return call(
        "torch._utils", "_rebuild_tensor_v2", identity, number(offset), *sizes, b"\x89", hooks
    )


def legacy(content: bytes, keys=("0",), numel=4) -> bytes:
    """As torch.save wrote it before 1.6."""
    head = b"".join(
        pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    return head + content + pickle.dumps(list(keys), 2) + struct.pack("<q4f", numel, 1, 2, 3, 4)


def tensors(canary: Path) -> dict[str, bytes]:
    code = text(f"open({str(canary)!r}, 'w')")
    gadget = {"model": Gadget(canary)}
    wrong = {
        "storage_huge": {"numel": HUGE, "size": (HUGE,)},
        "storage_larger": {"numel": 5},
        "storage_negative": {"numel": -4},
        "size_beyond": {"size": (5,)},
        "stride_beyond": {"size": (2, 2), "stride": (3, 1)},
        "offset_beyond": {"offset": 1},
        "offset_negative": {"offset": -1},
        "size_negative": {"size": (-4,)},
        "stride_negative": {"stride": (-1,)},
        "size_overflow": {"size": (2**40, 2**40), "stride": (2**40, 1)},
        "expanded": {"size": (HUGE,), "stride": (0,)},
        "kind_unknown": {"kind": "torch\nEvilStorage"},
        "kind_class": {"kind": "os\nsystem"},
        "key_path": {"key": "../data.pkl"},
        "key_absent": {"key": "7"},
        "hooks": {"hooks": b"ccollections\nOrderedDict\n)RK\0Ns"},
    }
    files = {}
    data = {"weights/data/0": bytes(16)}
    for name, change in wrong.items():
        files[f"{name}.pth"] = archive(in_dict(tensor(**change)), data)
        files[f"{name}_legacy.pth"] = legacy(in_dict(tensor(legacy=True, **change)))
    opaque = "mmengine.logging.history_buffer"
    both = {
        "eval": call("builtins", "eval", code),
        "getattr": call("builtins", "getattr", b"cos\npath\n", text("join")),
        "getattr_called": call(
            "builtins", "getattr", f"c{opaque}\nHistoryBuffer\n".encode(), text("mean")
        )
        + code
        + b"\x85R",
        "hub_load": call("torch.hub", "load", text("evil/repo"), text("model")),
        "torch_load": call("torch", "load", text("other.pth")),
        "jit_load": call("torch.jit", "load", text("other.pt")),
        "jit_source": call("torch.jit", "_get_source", code),
        "load_from_bytes": call("torch.storage", "_load_from_bytes", text("x")),
        "from_file": call("torch", "from_file", text(str(canary)), b"\x88", number(8)),
        "rebuild_from_type": call("torch._tensor", "_rebuild_from_type_v2", b"NNNN"),
        "set_attributes": b"cargparse\nNamespace\n)\x81}" + text("__class__") + b"K\1sb",
        "setstate": b"cargparse\nNamespace\n)\x81}" + text("__setstate__")
        + b"ctorch._utils\n_rebuild_tensor_v2\nsb)b",
        "persistent_text": text("storage") + b"Q",
        "persistent_list": b"]Q",
        "persistent_module": b"(" + text("module") + b"ctorch.nn\nLinear\nNNtQ",
        "persistent_short": b"(" + text("storage") + b"tQ",
        "deep_tuples": b")" + b"\x85" * DEEP,
        "deep_lists": b"]" * DEEP + b"a" * (DEEP - 1),
        "memo_bomb": b")q\0" + b"h\0\x86q\0" * 60,
        "array_huge": arrays()["array_huge.pkl"][13:-2],
    }  # fmt: skip
    for name, instructions in both.items():
        files[f"{name}.pth"] = archive(in_dict(instructions), data)
        files[f"{name}_legacy.pth"] = legacy(in_dict(instructions))
    case = archive(in_dict(tensor(key="a")), {"weights/data/A": bytes(16)})
    return {
        **files,
        "reduce.pth": saved(gadget),
        "reduce_legacy.pth": saved(gadget, legacy=True),
        "module.pth": saved(torch.nn.Linear(2, 2)),
        "case_of_key.pth": case,
        "storage_twice.pth": archive(twice(legacy=False), data),
        "storage_twice_legacy.pth": legacy(twice(legacy=True)),
        "meta.pth": saved({"model": torch.zeros(HUGE, device="meta")}),
        "sparse.pth": saved({"model": torch.eye(3).to_sparse()}),
        "no_keys_legacy.pth": legacy(in_dict(tensor(legacy=True)), keys=()),
        "key_twice_legacy.pth": legacy(in_dict(tensor(legacy=True)), keys=("0", "0")),
        "other_key_legacy.pth": legacy(in_dict(tensor(legacy=True)), keys=("1",)),
        "storage_huge_twice_legacy.pth": legacy(
            in_dict(tensor(numel=HUGE, legacy=True)), numel=HUGE
        ),
        "other_size_legacy.pth": legacy(in_dict(tensor(legacy=True)), numel=HUGE),
    }


def repeated_tensors() -> dict[str, bytes]:
    """Files with few bytes and many tensors on them, or one tensor under many names."""
    hooks = b"ccollections\nOrderedDict\n)Rq\0"
    state = {
        "data": b"}" + text("data") + b"Ns",
        "class": b"}" + text("__class__") + b"Ns",
        "grad": b"}" + text("grad") + b"Ns",
        "slots": b"N}" + text("a") + b"Ns\x86",
    }
    files = {}
    for ending, is_legacy in {".pth": False, "_legacy.pth": True}.items():

        def file(content: bytes, numel: int = 4, is_legacy: bool = is_legacy) -> bytes:
            if is_legacy:
                return legacy(content, numel=numel) + bytes(4 * numel - 16)
            return archive(content, {"weights/data/0": bytes(4 * numel)})

        def named(first: bytes, other: bytes, count: int) -> bytes:
            others = b"".join(text(f"w{i}") + other for i in range(count))
            return b"\x80\2}(" + text("w") + first + others + b"u."

        view = {"legacy": is_legacy, "numel": 2**18, "size": (512, 512), "stride": (512, 1)}
        expanded = {"legacy": is_legacy, "size": (1024, 1024), "stride": (0, 0)}
        long_size = b"(" + b"K\1" * 10_000 + b"t\x85q\0ctorch\nSize\nq\1"
        files |= {
            f"expanded_often{ending}": file(
                named(tensor(**expanded, hooks=hooks), tensor(**expanded), 3000)
            ),
            f"views_often{ending}": file(named(tensor(**view), tensor(**view), 3000), 2**18),
            f"named_often{ending}": file(named(tensor(**view) + b"q\0", b"h\0", 50_000), 2**18),
            f"parameter_often{ending}": file(
                named(
                    tensor(**view) + b"q\0",
                    call("torch._utils", "_rebuild_parameter", b"h\0\x88" + hooks[:-2]),
                    1000,
                ),
                2**18,
            ),
            f"long_size{ending}": file(
                b"\x80\2(" + tensor(legacy=is_legacy) + long_size + b"h\1h\0R" * 50_000 + b"l."
            ),
        }
        for name, attributes in state.items():
            made = attributes_of(tensor(legacy=is_legacy), attributes)
            files[f"attribute_{name}{ending}"] = file(in_dict(made))
        other = {
            "call": {"function": b"cbuiltins\ngetattr\n"},
            "class": {"cls": b"cargparse\nNamespace\n"},
        }
        for name, change in other.items():
            made = attributes_of(tensor(legacy=is_legacy), b"}", **change)
            files[f"attributes_of_{name}{ending}"] = file(in_dict(made))
    return files


def attributes_of(
    made: bytes,
    attributes: bytes,
    function=b"ctorch._utils\n_rebuild_tensor_v2\n",
    cls=b"ctorch\nTensor\n",
) -> bytes:
    """The instructions for a tensor with attributes, from those of ``tensor``."""
    arguments = made[made.index(b"(") : -1]
    return call("torch._tensor", "_rebuild_from_type_v2", function, cls, arguments, attributes)


def twice(**kwargs) -> bytes:
    """Two tensors of one storage that declare it differently."""
    return in_dict(
        tensor(**kwargs) + tensor(kind="torch\nLongStorage", numel=2, **kwargs) + b"\x86"
    )


def safetensors(header: bytes, length=None, data=bytes(16)) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def others() -> dict[str, bytes]:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as target:
        target.addfile(tarfile.TarInfo("pickle"))
    one = b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,%s]}}'
    return {
        "header_huge.safetensors": safetensors(b"{}", 2**60),
        "header_beyond.safetensors": safetensors(b"{}", 1000),
        "offsets_beyond.safetensors": safetensors(one % (b"8", b"32")),
        "shape_huge.safetensors": safetensors(one % (b"1099511627776", b"16")),
        "shape_negative.safetensors": safetensors(one % (b"-4", b"16")),
        "json_deep.safetensors": safetensors(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}"),
        "json_wrong.safetensors": safetensors(b'{"a": 1}'),
        "page.pkl": b"<!DOCTYPE html>\n<html><body>404</body></html>",
        "pointer.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "error.json": b'{"message": "Not Found"}',
        "tar.pth": tar.getvalue(),
        "gzip.pth": b"\x1f\x8b\x08" + bytes(20),
        "array.npy": b"\x93NUMPY\1\0" + bytes(20),
        "nothing.pth": b"",
        "protocol_9.pkl": b"\x80\x09}.",
        "program": b"\x7fELF" + bytes(100),
        "zeros": bytes(1000),
    }  # fmt: skip


def valid() -> dict[str, bytes]:
    """One file in order of each kind."""
    import safetensors.torch

    rng = np.random.default_rng(0)
    state = collections.OrderedDict(
        (f"conv{i}.weight", rng.standard_normal((3, 5)).astype("f4")) for i in range(4)
    )
    torch_state = {k: torch.from_numpy(v) for k, v in state.items()}
    return {
        **{f"valid_{p}.pkl": pickle.dumps({"model": state}, p) for p in (0, 2, 4, 5)},
        "valid.pth": saved({"model": torch_state, "iteration": 3, "extra": state}),
        "valid_legacy.pth": saved({"model": torch_state, "extra": state}, legacy=True),
        "valid.safetensors": safetensors.torch.save(torch_state, {"source": "test"}),
    }


def cut() -> dict[str, bytes]:
    """The files in order, cut at several places."""
    return {
        f"cut_{number}_{name}": content[:size]
        for name, content in valid().items()
        for number, size in enumerate(
            [1, 2, 12, *(len(content) * n // 10 for n in (2, 4, 6, 8, 9)), len(content) - 1]
        )
    }
