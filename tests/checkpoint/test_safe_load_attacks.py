"""Files that are no weights: refused with a sentence, at once, in little memory, and never run."""

import json
import os
import pickle
import re

import hostile_weights
import numpy as np
import pytest
from helpers import run_script

from gn_detect.checkpoint.safe_load import WeightsError, load_file

# The file's own flaw is what it is refused for, and not one of how it is written here.
REASONS = {
    r"asks for '(posix|os)\.": "reduce inst obj getattr array_of_class kind_class memo_index",
    "asks for 'builtins": "eval exec",
    "asks for '(subprocess|copyreg|collections|numpy|torch)": "stack_global dotted_global newobj "
    "copyreg numpy_ torch_ hub_load jit_ load_from_bytes from_file meta sparse "
    "module kind_unknown persistent_module",
    "instruction": "ext1 ext4 newobj_ex buffer instructions",
    "refers to": "binpersid persistent_text persistent_list persistent_short",
    "holds": "global_ setstate holds_itself.",
    "in use": "holds_itself_late deep_late",
    "sets attributes": "build_ordered_dict build_setstate build_slots set_attributes",
    "gives a state": "build_class",
    "nested": "deep_tuples deep_lists deep_dicts deep_text",
    "more than 10,000,000 items": "memo_bomb. memo_bomb_legacy",
    "key of type tuple": "memo_bomb_as_key",
    "key of type int": "colliding_keys",
    "ends in the middle": "long_string storage_huge_legacy storage_huge_twice_legacy",
    "128 bits": "long_integer",
    "copies of the same bytes": "copies bytearray_copies",
    "copies of the same items": "repeat_",
    "no part of its content": "left",
    "refer to the same data": "expanded_often views_often named_often parameter_often "
    "array_named_again array_shares",
    "keys that are tuples": "many_tuple_keys",
    "with a key of type": "set_of_list tuple_of_list complex_key",
    "set of something": "set_of_text",
    "adds items to a list": "set_items",
    "bytearray of something": "bytearray_size",
    "complex number of": "complex_of",
    "or holds itself": "holds_itself_opaque holds_itself_namespace",
    "before it is made": "unbuilt",
    "Size of something": "long_size",
    "attributes that a tensor": "attribute_",
    "calls": "array_call getattr_called",
    "array (of|whose)": "many_sizes array_huge array_overflow array_negative array_short "
    "array_of_list array_objects array_fields array_text array_frombuffer dtype_ scalar_ ",
    "in another way": "rebuild_from_type attributes_of array_fresh_huge array_state_twice",
    "member": "parent absolute backslash drive link nested extra case.pth twice encrypted",
    "compressed": "bomb",
    "overlap": "overlapping",
    "folder": "second_root no_pickle folder",
    "TorchScript": "script",
    "end": "before after comment second_end",
    "declares": "storage_huge.pth storage_larger.pth storage_negative storage_twice case_of_key "
    "key_absent.pth header_",
    "another size than it declares": "storage_larger_legacy other_size",
    "beyond its storage": "size_beyond stride_beyond offset_beyond size_overflow",
    "no sizes": "offset_negative size_negative stride_negative",
    "storage of only": "expanded",
    "unusual name": "key_path",
    "list of storages": "key_absent_legacy no_keys key_twice other_key",
    "hooks": "hooks",
    "header": "offsets_beyond shape_ json_",
    "not a file of weights": "page pointer error tar gzip array.npy nothing protocol_9 program "
    "zeros persid many_digits empty",
}
CHILD = """
import json, resource, sys, time
from pathlib import Path
from gn_detect.checkpoint.safe_load import WeightsError, load_file

folder, canary, valid = map(Path, sys.argv[1:])
for path in valid.iterdir():
    load_file(path)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
results = {}
for path in sorted(folder.iterdir()):
    start = time.perf_counter()
    try:
        load_file(path)
        message = None
    except WeightsError as error:
        message = str(error)
    results[path.name] = (message, time.perf_counter() - start, canary.exists())
Path("results.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """File name -> message, seconds, whether it ran; in 1 GiB of memory."""
    root = tmp_path_factory.mktemp("attacks")
    folder, valid, canary = root / "files", root / "valid", root / "canary"
    folder.mkdir()
    valid.mkdir()
    hostile_weights.write(folder, canary)
    for name, content in hostile_weights.valid().items():
        (valid / name).write_bytes(content)
    run_script(CHILD, folder, canary, valid, cwd=root)
    return json.loads((root / "results.json").read_text())


def test_all_are_refused(results):
    assert [name for name, (message, _, _) in results.items() if message is None] == []


def test_nothing_is_run(results):
    assert [name for name, (_, _, ran) in results.items() if ran] == []


def test_within_two_seconds(results):
    assert {name: seconds for name, (_, seconds, _) in results.items() if seconds > 2} == {}


def test_sentence(results):
    for name, (message, _, _) in results.items():
        assert re.search(rf"/{re.escape(name)} is (refused|damaged|not a file|a folder)", message)
        assert "\n" not in message and len(message) < 600


def test_reason(results):
    wrong = []
    for name, (message, _, _) in results.items():
        if not name.startswith("cut_"):
            fitting = [
                (len(start), reason)
                for reason, starts in REASONS.items()
                for start in starts.split()
                if name.startswith(start)
            ]
            if not re.search(max(fitting)[1], message):
                wrong.append((name, max(fitting)[1], message))
    assert wrong == []


@pytest.mark.parametrize("name", ["reduce_0.pkl", "reduce_5.pkl", "inst.pkl", "eval.pkl"])
def test_attacks_work_on_pickle(tmp_path, name):
    """Without which the tests above could not fail."""
    canary = tmp_path / "canary"
    content = hostile_weights.pickles(canary)[name]
    pickle.loads(content)
    assert canary.exists()


def test_links_and_devices(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="pipe is not a regular file"):
        load_file(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="there is no file .*absent.pth"):
        load_file(tmp_path / "absent.pth")


@pytest.mark.parametrize("name", hostile_weights.valid())
def test_changed_bytes(tmp_path, name):
    """A changed file is read or refused, and raises nothing else."""
    fuzz(hostile_weights.valid()[name], tmp_path / name, rounds=60, seed=0)


def fuzz(content: bytes, path, rounds: int, seed: int) -> int:
    """Load ``content`` with a few bytes changed, removed or moved; how many of them load."""
    rng = np.random.default_rng(seed)
    loaded = 0
    for _ in range(rounds):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(changed)))
            kind = rng.integers(4)
            if kind < 2:
                changed[at] ^= 1 << int(rng.integers(8)) if kind else int(rng.integers(1, 256))
            elif kind == 2:
                del changed[at : at + int(rng.integers(1, 9))]
            else:
                part = changed[at : at + 8]
                to = int(rng.integers(len(changed)))
                changed[to : to + len(part)] = part
        path.write_bytes(changed)
        try:
            load_file(path)
            loaded += 1
        except WeightsError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    return loaded
