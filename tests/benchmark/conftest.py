import pytest

from gn_detect.benchmark.detectors import Settings

# An R18, and narrow heads.
OPTS = (
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
)


@pytest.fixture(scope="session")
def settings():
    """Of a model that takes a step on a CPU in a moment."""
    return Settings(OPTS, size=(64, 96), rois=16)
