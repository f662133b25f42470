"""Detectron2's own lazy configs (``model_zoo/configs/common``), which these change."""

from pathlib import Path

import detectron2
from detectron2.config import LazyConfig


def load(file, name):
    """What ``file`` there calls ``name``."""
    # By its path: to import detectron2.model_zoo takes pkg_resources, which setuptools dropped.
    directory = Path(detectron2.__file__).parent / "model_zoo/configs/common"
    return LazyConfig.load(str(directory / file), name)
