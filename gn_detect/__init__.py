"""Group Normalization for Detectron2: importing this package registers its components.

Then a YAML file can name ``build_gn_resnet_fpn_backbone``, ``GNFastRCNNConvFCHead`` and
``GNMaskRCNNConvUpsampleHead``, after ``add_gn_config(cfg)`` has added the ``MODEL.GN`` keys.
"""

import warnings
from typing import Any

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    raise ImportError(
        "gn_detect needs detectron2, which is not on the package index. In a checkout of "
        "gn_detect, `make venv` sets up everything; by hand: `pip install tools/detectron2_alias` "
        "and `pip install --no-deps --ignore-requires-python LabGym==3.1.2`. The official build: "
        "`pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2`."
    ) from None

from . import modeling as _modeling  # noqa: F401  # only registration
from .config import add_gn_config, get_config_file
from .data import shapes as _shapes  # noqa: F401  # only registration

# What supervision says when it is imported; it draws with Pillow and NumPy then.
warnings.filterwarnings("ignore", "OpenCV .* is not installed", UserWarning)

__version__ = "0.1.0"
__all__ = ["Predictor", "add_gn_config", "get_config_file"]


def __getattr__(name: str) -> Any:
    if name == "Predictor":  # what it imports takes time, and needs more than the registration
        from .predict import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
