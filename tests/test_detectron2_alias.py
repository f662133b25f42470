"""tools/detectron2_alias: ``detectron2.x`` is the very module ``LabGym.detectron2.x``.

What an import leaves behind depends on what was imported before, so every test runs its scripts in
fresh interpreters. Each of them imports torch (seconds), hence few scripts with many assertions.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import textwrap

import pytest


def _alias_is_installed():
    try:
        return "+labgym" in importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(
    not _alias_is_installed(), reason="detectron2 here is not the alias of LabGym.detectron2"
)


def _run(tmp_path, *args, **env):
    """Run ``python *args`` in ``tmp_path``, on the CPU; return its output."""
    inherited = {k: v for k, v in os.environ.items() if k != "DETECTRON2_ENV_MODULE"}
    result = subprocess.run(
        [sys.executable, *args],
        cwd=tmp_path,
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _run_script(tmp_path, source, **env):
    (tmp_path / "script.py").write_text(textwrap.dedent(source))
    return _run(tmp_path, "script.py", **env)


def test_same_objects_whichever_name_comes_first(tmp_path):
    (tmp_path / "snapshot.py").write_text(
        textwrap.dedent(
            """
            import importlib

            def snapshot(root):
                '''What the import system wrote into a package, a subpackage and a module.'''
                found = {}
                for name in ("", ".layers", ".layers.batch_norm"):
                    module = importlib.import_module(root + name)
                    spec = module.__spec__
                    assert spec.loader is module.__loader__
                    assert not getattr(spec, "_initializing", False)
                    found[name] = [
                        module.__name__,
                        module.__package__,
                        module.__file__,
                        list(getattr(module, "__path__", ())),
                        spec.name,
                        spec.origin,
                        list(spec.submodule_search_locations or ()),
                        type(spec.loader).__name__,
                    ]
                return found
            """
        )
    )
    labgym_first = _run_script(
        tmp_path,
        """
        import json, sys
        from snapshot import snapshot
        print(json.dumps(snapshot("LabGym.detectron2")))
        assert not any(name.split(".")[0] == "detectron2" for name in sys.modules)

        import LabGym.detectron2.layers.batch_norm as real
        import detectron2.layers.batch_norm as alias
        assert alias is real
        assert sys.modules["detectron2"] is sys.modules["LabGym.detectron2"]
        print(json.dumps(snapshot("detectron2")))
        """,
    )
    alias_first = _run_script(
        tmp_path,
        """
        import importlib, json, pickle, pkgutil, sys
        import detectron2.layers.batch_norm
        from snapshot import snapshot
        print(json.dumps(snapshot("detectron2")))

        import LabGym, LabGym.detectron2.layers.batch_norm
        assert LabGym.detectron2 is detectron2
        assert LabGym.detectron2.layers.batch_norm is detectron2.layers.batch_norm

        from detectron2.layers import batch_norm, get_norm
        assert batch_norm is LabGym.detectron2.layers.batch_norm
        assert get_norm is LabGym.detectron2.layers.batch_norm.get_norm
        from detectron2.layers.batch_norm import FrozenBatchNorm2d
        assert FrozenBatchNorm2d is LabGym.detectron2.layers.FrozenBatchNorm2d

        # Every submodule, however it is found.
        import detectron2.structures
        names = [
            info.name
            for root in ("layers", "structures")
            for info in pkgutil.walk_packages(
                getattr(detectron2, root).__path__, f"detectron2.{root}."
            )
        ]
        assert "detectron2.layers.wrappers" in names and "detectron2.structures.boxes" in names
        for name in names:
            assert importlib.import_module(name) is importlib.import_module("LabGym." + name)

        # One registry: what is registered under one name is known under the other.
        from detectron2.modeling import BACKBONE_REGISTRY
        from LabGym.detectron2.modeling.backbone.build import BACKBONE_REGISTRY as same
        assert same is BACKBONE_REGISTRY and "build_resnet_fpn_backbone" in same
        BACKBONE_REGISTRY.register(lambda cfg, shape: None)

        for name in ("detectron2.nonsense", "detectron2.layers.nonsense"):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                assert error.name == name and name in str(error), error
            else:
                raise AssertionError(name)

        # Pickles of this process, and pickles that name detectron2 (made with the official build).
        import torch
        from detectron2.layers import cat
        from detectron2.structures import Boxes, Instances
        boxes = Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        instances = Instances((5, 6), pred_boxes=boxes)
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            load = lambda x: pickle.loads(pickle.dumps(x, protocol))
            assert load(Boxes) is Boxes and load(cat) is cat
            back = load(instances)
            assert type(back) is Instances and type(back.pred_boxes) is Boxes
            assert back.image_size == (5, 6) and torch.equal(back.pred_boxes.tensor, boxes.tensor)
        # Protocol 0 writes names as lines of text, so the prefix can be cut off.
        official = pickle.dumps(instances, 0).replace(b"LabGym.detectron2", b"detectron2")
        assert b"LabGym" not in official and b"detectron2.structures.boxes\\n" in official
        assert type(pickle.loads(official)) is Instances
        assert type(pickle.loads(official).pred_boxes) is Boxes
        assert pickle.loads(b"cdetectron2.layers.wrappers\\ncat\\n.") is cat
        """,
    )
    expected, after_alias = map(json.loads, labgym_first.splitlines())
    assert expected[".layers"][0] == "LabGym.detectron2.layers"
    assert after_alias == expected
    assert json.loads(alias_first) == expected


def test_launch_spawns_workers(tmp_path):
    # The workers unpickle Boxes before anything in them has imported detectron2.
    out = _run_script(
        tmp_path,
        """
        import sys

        def work(boxes):
            assert "detectron2" not in sys.modules
            assert type(boxes).__module__ == "LabGym.detectron2.structures.boxes"
            import torch
            import torch.distributed as dist
            from detectron2.structures import Boxes
            from detectron2.utils import comm
            assert type(boxes) is Boxes and dist.get_backend() == "gloo"
            rank = comm.get_rank()
            assert comm.get_world_size() == 2
            total = torch.tensor(rank + 1.0)
            dist.all_reduce(total)
            assert total.item() == 3
            gathered = comm.all_gather(Boxes(boxes.tensor + rank))
            assert [type(x) for x in gathered] == [Boxes, Boxes]
            assert gathered[1].tensor.tolist() == [[2, 3, 4, 5]]
            print(f"worker {rank} done")

        if __name__ == "__main__":
            import torch
            from detectron2.engine import launch
            from detectron2.structures import Boxes
            launch(work, 2, dist_url="auto", args=(Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]])),))
        """,
    )
    assert "worker 0 done" in out and "worker 1 done" in out


@pytest.mark.parametrize("first, hook", [("detectron2", "hook.py"), ("LabGym.detectron2", "hook")])
def test_env_module_hook_sees_the_module_being_imported(tmp_path, first, hook):
    (tmp_path / "hook.py").write_text(
        textwrap.dedent(
            """
            def setup_environment():
                import sys
                import detectron2
                assert detectron2 is sys.modules["LabGym.detectron2"]
                assert not hasattr(detectron2, "__version__")  # its last line: still being imported
                from detectron2.config import get_cfg
                import detectron2.layers.batch_norm
                import LabGym.detectron2.layers.batch_norm as real
                assert detectron2.layers.batch_norm is real
                get_cfg().MODEL
                detectron2.hook_ran = True
            """
        )
    )
    _run_script(
        tmp_path,
        f"""
        import {first}
        import detectron2, LabGym.detectron2, detectron2.layers.batch_norm
        assert detectron2.hook_ran and detectron2 is LabGym.detectron2
        assert detectron2.__version__
        assert detectron2.layers.batch_norm is LabGym.detectron2.layers.batch_norm
        """,
        DETECTRON2_ENV_MODULE=hook,
    )


def test_failed_import_says_why_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "other" / "LabGym").mkdir(parents=True)
    (tmp_path / "other" / "LabGym" / "__init__.py").touch()  # a LabGym without the copy
    attempt = """
        import sys
        {prepare}
        try:
            import detectron2
        except ImportError as error:
            assert {condition}, repr(error)
        else:
            raise AssertionError("imported")
        assert not any("Alias" in str(finder) for finder in sys.meta_path)
        assert "detectron2" not in sys.modules and "LabGym.detectron2" not in sys.modules
        """
    tells_how = "'pip install --no-deps --ignore-requires-python LabGym==' in str(error)"
    for prepare, condition in (
        ("sys.modules['LabGym'] = None", tells_how),
        ("sys.path.insert(0, 'other')", tells_how),
        ("sys.modules['torch'] = None", "error.name == 'torch'"),
    ):
        _run_script(tmp_path, attempt.format(prepare=prepare, condition=condition))


def test_distribution_and_command_line(tmp_path):
    version = importlib.metadata.version("detectron2")
    if importlib.util.find_spec("pip"):
        assert f"Version: {version}" in _run(tmp_path, "-m", "pip", "show", "detectron2")
    report = _run(tmp_path, "-m", "detectron2.utils.collect_env")
    assert "detectron2" in report and "PyTorch" in report
