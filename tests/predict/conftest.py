import pytest
from helpers import TINY, config
from predict.saved import MASK_RCNN, NAMES, save


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Of a tiny Mask R-CNN of the classes ``NAMES``; beside them are those as ``.pth``."""
    cfg = config(MASK_RCNN, *TINY, "MODEL.ROI_HEADS.NUM_CLASSES", 2)
    return save(tmp_path_factory.mktemp("weights"), cfg, classes=NAMES)
