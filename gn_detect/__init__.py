"""Group Normalization for Detectron2: importing this package registers its components.

Then a YAML file can name ``build_gn_resnet_fpn_backbone``, ``GNFastRCNNConvFCHead`` and
``GNMaskRCNNConvUpsampleHead``, after ``add_gn_config(cfg)`` has added the ``MODEL.GN`` keys.
"""

import logging
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
else:
    # What PyTorch and supervision say to the authors of Detectron2, and at each start.
    warnings.filterwarnings("ignore", "OpenCV .* is not installed", UserWarning)
    warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)
    warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated", FutureWarning)
    logging.getLogger("torch.fx._symbolic_trace").addFilter(
        lambda record: "is_fx_tracing" not in record.getMessage()
    )

from . import modeling as _modeling  # noqa: F401  # only registration
from .config import add_gn_config, get_config_file
from .data import shapes as _shapes  # noqa: F401  # only registration

__version__ = "0.1.0"
__all__ = ["Predictor", "add_gn_config", "get_config_file"]


def __getattr__(name: str) -> Any:
    if name == "Predictor":  # what it imports takes time, and needs more than the registration
        from .predict import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
