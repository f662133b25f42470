"""tools/detectron2_alias: ``detectron2.x`` is the very module ``LabGym.detectron2.x``.

What an import leaves behind depends on what was imported before, so each test runs its scripts in
fresh interpreters. Each of them imports torch (seconds), hence few scripts with many assertions.
"""

import importlib.metadata

import pytest
from helpers import run_script

VERSIONS = [d.version for d in importlib.metadata.distributions(name="detectron2")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any("+labgym" in version for version in VERSIONS),
        reason="detectron2 here is not the alias of LabGym.detectron2",
    ),
]

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
import importlib, json

def snapshot(root, file):
    '''Write what the import system wrote into a package, a subpackage and a module.'''
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
    with open(file, "w") as file:
        json.dump(found, file)
"""
ALIAS_FIRST = """
import importlib, pickle, pkgutil
import detectron2.layers.batch_norm
from snapshot import snapshot
snapshot("detectron2", "alias_first")
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
import pickle, runpy, sys
with open("boxes.pickle", "rb") as file:
    boxes = pickle.load(file)
from snapshot import snapshot
snapshot("LabGym.detectron2", "labgym_first")
assert sys.modules["LabGym.detectron2"].hook_ran

import LabGym.detectron2.layers.batch_norm as real
import detectron2.layers.batch_norm as alias
assert alias is real and sys.modules["detectron2"] is sys.modules["LabGym.detectron2"]
from detectron2.structures import Boxes
assert type(boxes) is Boxes and boxes.tensor.tolist() == [[1, 2, 3, 4]]
snapshot("detectron2", "alias_second")
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


def test_same_objects_whichever_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / "hook.py").write_text(HOOK)
    (tmp_path / "snapshot.py").write_text(SNAPSHOT)
    for script, hook in ((ALIAS_FIRST, "hook.py"), (LABGYM_FIRST, "hook")):
        monkeypatch.setenv("DETECTRON2_ENV_MODULE", hook)
        run_script(script, cwd=tmp_path)
    names = ("alias_first", "alias_second", "labgym_first")
    first, second, expected = ((tmp_path / name).read_text() for name in names)
    assert first == second == expected and '"LabGym.detectron2.layers"' in expected


def test_failed_import_says_why_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_ENV_MODULE", "")
    (tmp_path / "other/LabGym").mkdir(parents=True)
    (tmp_path / "other/LabGym/__init__.py").touch()  # a LabGym without the copy
    run_script(FAILURES, cwd=tmp_path)
