import pytest
from omegaconf import OmegaConf

import gn_detect
from gn_detect.data.coco import register_coco_json
from gn_detect.engine.lazy_config import load_lazy_config

QUICK = gn_detect.get_config_file("lazy/quickstart/mask_rcnn_R_18_FPN_gn_shapes.py")


@pytest.fixture
def lazy_data(coco_files):
    """The quickstart config on three images of two classes."""
    register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))

    def load(*overrides):
        cfg = load_lazy_config(QUICK, overrides)
        loaders = cfg.dataloader
        for loader in (loaders.train, loaders.test):
            loader.num_workers = 0
            loader.dataset.names = "own"
            loader.mapper.augmentations[0].short_edge_length = [64, 64]
        for key, value in (("model.roi_heads.num_classes", 2), ("train.device", "cpu")):
            if not any(override.startswith(key) for override in overrides):
                OmegaConf.update(cfg, key, value)
        return cfg

    return load
