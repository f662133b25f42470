"""The name ``detectron2`` for the pure-Python copy of Detectron2 inside the LabGym distribution.

Detectron2 itself is not on the package index; LabGym 3.1.2 is, and holds all of Detectron2's Python
code as ``LabGym.detectron2``. This package adds no code of its own: every ``detectron2.x`` *is*
the module object ``LabGym.detectron2.x``, so there is one registry, one class, one catalog.
"""

import importlib
import importlib.machinery
import importlib.util
import sys


class _AliasFinder:
    """Import hook (PEP 451): ``detectron2.x`` loads and returns ``LabGym.detectron2.x``."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if not fullname.startswith("detectron2."):
            return None
        real = importlib.util.find_spec(f"LabGym.{fullname}")
        if real is None:
            return None
        is_package = real.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(
            fullname, _AliasFinder, origin=real.origin, is_package=is_package
        )

    @staticmethod
    def create_module(spec):
        module = importlib.import_module(f"LabGym.{spec.name}")
        spec.loader_state = module.__spec__  # importlib is about to replace it with the alias' own
        return module

    @staticmethod
    def exec_module(module):
        module.__spec__ = module.__spec__.loader_state

    @staticmethod
    def get_code(fullname):  # for `python -m detectron2.x`
        return importlib.util.find_spec(f"LabGym.{fullname}").loader.get_code(f"LabGym.{fullname}")


def _load():
    """Make ``detectron2`` the module ``LabGym.detectron2``, before the latter's first line runs:
    it imports $DETECTRON2_ENV_MODULE, which may import ``detectron2`` again."""
    try:
        spec = importlib.util.find_spec("LabGym.detectron2")
    except ModuleNotFoundError:
        spec = None
    if spec is None:  # no LabGym, or one without the copy
        raise ImportError(
            "This `detectron2` is an alias of LabGym.detectron2, which is not installed: "
            "pip install --no-deps --ignore-requires-python LabGym==3.1.2"
        )
    sys.meta_path.insert(0, _AliasFinder)
    module = sys.modules.get(spec.name)
    if module is not None:
        sys.modules[__name__] = module
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[__name__] = sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        sys.meta_path.remove(_AliasFinder)
        raise
    sys.modules["LabGym"].detectron2 = module


_load()
