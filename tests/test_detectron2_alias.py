"""tools/detectron2_alias: ``detectron2.x`` is the very module ``LabGym.detectron2.x``.

What an import leaves behind depends on what was imported before, so each test runs its scripts in
fresh interpreters. Each of them imports torch (seconds), hence few scripts with many assertions.
"""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not any("+labgym" in d.version for d in importlib.metadata.distributions(name="detectron2")),
    reason="detectron2 here is not the alias of LabGym.detectron2",
)

# $DETECTRON2_ENV_MODULE is imported in the middle of ``import detectron2``.
HOOK = """
def setup_environment():
    import sys
    import detectron2
    assert detectron2 is sys.modules["LabGym.detectron2"]
    assert not hasattr(detectron2, "__version__")  # its last line: still being imported
    import detectron2.config.defaults as alias
    import LabGym.detectron2.config.defaults as real
    assert alias is real
    detectron2.hook_ran = True
"""
SNAPSHOT = """
import importlib

def snapshot(root):
    '''What the import system wrote into a package, a subpackage and a module.'''
    found = {}
    for name in ("", ".layers", ".layers.batch_norm"):
        module = importlib.import_module(root + name)
        spec = module.__spec__
        assert spec.loader is module.__loader__ and not getattr(spec, "_initializing", False)
        found[name] = [
            *(module.__name__, module.__package__, module.__file__, spec.name, spec.origin),
            *(getattr(module, "__path__", []), spec.submodule_search_locations or []),
            type(spec.loader).__name__,
        ]
    return found
"""
ALIAS_FIRST = """
import importlib, json, pickle, pkgutil
import detectron2.layers.batch_norm
from snapshot import snapshot
print(json.dumps(snapshot("detectron2")))
assert detectron2.hook_ran and detectron2.__version__

import LabGym.detectron2.layers.batch_norm
from detectron2.layers import batch_norm, get_norm
assert LabGym.detectron2 is detectron2 and LabGym.detectron2.layers.batch_norm is batch_norm
assert get_norm is batch_norm.get_norm
import detectron2.structures
for info in pkgutil.walk_packages(detectron2.structures.__path__, "detectron2.structures."):
    assert importlib.import_module(info.name) is importlib.import_module("LabGym." + info.name)
from detectron2.modeling import BACKBONE_REGISTRY
from LabGym.detectron2.modeling.backbone.build import BACKBONE_REGISTRY as same
assert same is BACKBONE_REGISTRY and "build_resnet_fpn_backbone" in same

for name in ("detectron2.nonsense", "detectron2.layers.nonsense"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name == name and name in str(error), error
    else:
        raise AssertionError(name)

# Pickles of this process, and pickles that name detectron2 (made with the official build).
import torch
from detectron2.structures import Boxes
pickled = pickle.dumps(Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]])), 0)  # names as lines of text
official = pickled.replace(b"LabGym.detectron2", b"detectron2")
assert b"LabGym" not in official and b"detectron2.structures.boxes\\n" in official
assert type(pickle.loads(pickled)) is type(pickle.loads(official)) is Boxes
with open("boxes.pickle", "wb") as file:
    file.write(pickled)
"""
# It starts as a process does that Detectron2's launch() has spawned: with a pickle of arguments.
LABGYM_FIRST = """
import json, pickle, runpy, sys
with open("boxes.pickle", "rb") as file:
    boxes = pickle.load(file)
from snapshot import snapshot
print(json.dumps(snapshot("LabGym.detectron2")))
assert sys.modules["LabGym.detectron2"].hook_ran

import LabGym.detectron2.layers.batch_norm as real
import detectron2.layers.batch_norm as alias
assert alias is real and sys.modules["detectron2"] is sys.modules["LabGym.detectron2"]
from detectron2.structures import Boxes
assert type(boxes) is Boxes and boxes.tensor.tolist() == [[1, 2, 3, 4]]
print(json.dumps(snapshot("detectron2")))
runpy.run_module("detectron2.utils.collect_env", run_name="__main__")  # python -m
"""
FAILURES = """
import sys
for prepare, expected in (
    ("sys.modules['LabGym'] = None", "pip install --no-deps --ignore-requires-python LabGym=="),
    ("sys.path.insert(0, 'other')", "pip install --no-deps --ignore-requires-python LabGym=="),
    ("sys.path.pop(0); sys.modules['torch'] = None", "torch"),
):
    exec(prepare)
    try:
        import detectron2
    except ImportError as error:
        assert expected in str(error), repr(error)
    else:
        raise AssertionError("imported")
    assert not any("Alias" in str(finder) for finder in sys.meta_path)
    assert "detectron2" not in sys.modules and "LabGym.detectron2" not in sys.modules
    for name in [name for name in sys.modules if name.split(".")[0] == "LabGym"]:
        del sys.modules[name]
"""


def _run(directory, source, hook=""):
    """Run a script in ``directory``, on the CPU; return the lines of its output."""
    environment = {"DETECTRON2_ENV_MODULE": hook, "CUDA_VISIBLE_DEVICES": ""}
    (directory / "script.py").write_text(source)
    result = subprocess.run(
        [sys.executable, "script.py"],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def test_same_objects_whichever_name_comes_first(tmp_path):
    (tmp_path / "hook.py").write_text(HOOK)
    (tmp_path / "snapshot.py").write_text(SNAPSHOT)
    (alias_first,) = _run(tmp_path, ALIAS_FIRST, hook="hook.py")
    expected, after_alias, *report = _run(tmp_path, LABGYM_FIRST, hook="hook")
    assert json.loads(expected)[".layers"][0] == "LabGym.detectron2.layers"
    assert alias_first == after_alias == expected
    assert any(line.startswith("PyTorch") for line in report)


def test_failed_import_says_why_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "other/LabGym").mkdir(parents=True)
    (tmp_path / "other/LabGym/__init__.py").touch()  # a LabGym without the copy
    _run(tmp_path, FAILURES)
