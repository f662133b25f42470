"""``DETECTRON2_ENV_MODULE=gn_detect.env``: stock Detectron2 scripts understand our YAML.

Detectron2 runs :func:`setup_environment` at the end of its own environment set-up, inside
``import detectron2`` (detectron2/utils/env.py), so nothing here may need a complete ``detectron2``.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from .config import add_gn_config, locate

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# What Detectron2's own trainer, mapper and checkpointer do not read.
_KEYS_OF_OUR_TRAINER = (
    *("INPUT.LSJ.ENABLED", "SOLVER.IMS_PER_GPU", "SOLVER.ACCUMULATE_STEPS"),
    *("SOLVER.CHECKPOINT_KEEP", "SOLVER.AMP.DTYPE", "INPUT.BIT_DEPTH_RANGE"),
    *("INPUT.KEYPOINT_FLIP_PAIRS", "TEST.COCO_EVAL"),
)
_defaults: CfgNode | None = None  # of the process in which setup_environment has run


def setup_environment() -> None:
    """Add our keys to Detectron2's default config, and register our components."""
    global _defaults
    from detectron2.config.defaults import _C

    add_gn_config(_C)
    _defaults = _C.clone()


def warn_of_ignored_keys(cfg: CfgNode) -> None:
    """Warn once of keys in ``cfg`` that the trainer of a stock script ignores.

    The building of our components calls it: the only code of ours that such a script runs. It is
    one if :func:`setup_environment` has run and our trainer was never imported.
    """
    if _defaults is None or "gn_detect.engine" in sys.modules:
        return
    from detectron2.utils import comm
    from detectron2.utils.logger import log_first_n

    changed = []
    for key in _KEYS_OF_OUR_TRAINER:
        (node, name), (default, _) = locate(cfg, key), locate(_defaults, key)
        if node[name] != default[name]:
            changed.append(f"{key} {node[name]}")
    if changed and comm.is_main_process():
        log_first_n(
            logging.WARNING,
            f"{', '.join(changed)}: Detectron2's own trainer ignores this; train with "
            "tools/train_net.py of gn_detect, or with prepare_run and Trainer of gn_detect.engine",
            name=__name__,
            key="message",
        )
