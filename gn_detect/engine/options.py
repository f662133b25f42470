"""Options of Detectron2's own that would end a run in its middle, or do nothing in it."""

from __future__ import annotations

import importlib.util
import logging

from detectron2.config import CfgNode

from gn_detect.config import ConfigError

logger = logging.getLogger(__name__)


def check_options(cfg: CfgNode, *, training: bool) -> None:
    """
    Raises:
        ConfigError: training would need what is not installed, or fail in Detectron2 itself.
    """
    if cfg.TEST.AUG.ENABLED:
        logger.warning(
            "TEST.AUG.ENABLED is ignored: images are evaluated as they are. For test-time "
            "augmentation wrap the model in detectron2.modeling.GeneralizedRCNNWithTTA"
        )
    if not training:
        return
    if cfg.VIS_PERIOD > 0 and importlib.util.find_spec("cv2") is None:
        raise ConfigError(
            f"VIS_PERIOD is {cfg.VIS_PERIOD}, and Detectron2 draws with OpenCV, which is not "
            "installed: pip install opencv-python-headless, or set VIS_PERIOD 0"
        )
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupStepWithFixedGammaLR":
        raise ConfigError(
            "SOLVER.LR_SCHEDULER_NAME is WarmupStepWithFixedGammaLR, which fails at the last "
            "iteration (IndexError in fvcore's StepParamScheduler); use WarmupMultiStepLR with "
            "SOLVER.STEPS"
        )
