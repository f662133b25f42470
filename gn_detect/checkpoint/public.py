"""The public weights with GN: where they are, and the config of this project that fits.

Left out are copies of others, and detectors with deformable convolutions, which no config here has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class PublicWeights:
    """A file of a detector or of a backbone.

    Args:
        name: as ``MODEL.WEIGHTS`` takes it.
        url: of the file; "" where Detectron2 or ``sources.py`` has it by this name.
        published: box AP, "/" and mask AP of a detector on COCO; top-1 accuracy of a classifier on
            ImageNet; "" for none.
        parameters: millions in the file, those of a classifier included; 4 bytes each.
        config: below configs/, that with ``changes`` (KEY VALUE ...) is what they were trained in.
        layout: of ``Weights.format``.
        licence: that of the repository, where none is stated for the weights.
        page: that has the file, the figures and the licence.
    """

    name: str
    url: str
    published: str
    parameters: float
    config: str
    changes: tuple[Any, ...]
    layout: str
    licence: str
    page: str

    def is_detector(self) -> bool:
        return "rcnn" in self.name.lower()


_MASK, _BOX = "COCO-InstanceSegmentation/mask_rcnn_", "COCO-Detection/faster_rcnn_"
_SCRATCH = "COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_gn_"
_DETECTRON, _TENSORPACK = "Detectron/mask_rcnn_", "tensorpack/"
_RGB = ("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", (123.675, 116.28, 103.53))
_RGB += ("MODEL.PIXEL_STD", (58.395, 57.12, 57.375))
_BIT = f"{_MASK}R_50x1_bit_FPN_gn_ws_3x"


def _bit(depth: int, width: int) -> tuple:
    """``_BIT`` for another depth, and ``width`` times the channels."""
    widths = {"STEM_OUT_CHANNELS": 64, "WIDTH_PER_GROUP": 64, "RES2_OUT_CHANNELS": 256}
    pairs = ((f"MODEL.RESNETS.{key}", width * value) for key, value in widths.items())
    return sum(pairs, ("MODEL.RESNETS.DEPTH", depth))


def _channels_per_group(channels: int) -> tuple:
    return "MODEL.GN.NUM_GROUPS", 0, "MODEL.GN.CHANNELS_PER_GROUP", channels


def _mmdetection(file: str) -> tuple[str, str]:
    path, end = file.split()
    name = path.rpartition("/")[2]
    end = end if end.startswith("scratch_") else f"{name}_{end}"
    url = f"https://download.openmmlab.com/mmdetection/v2.0/{path.replace('+', '%2B')}/{end}.pth"
    return f"mmdetection://{name}", url


def _named(name: str, url: str | None = None) -> Callable[[str], tuple[str, str]]:
    return lambda file: (name.format(file), (name if url is None else url).format(file))


_tensorpack = _named("tensorpack://{}", "http://models.tensorpack.com/FasterRCNN/{}.npz")
_timm = _named("timm://{}", "https://huggingface.co/timm/{}/resolve/main/model.safetensors")

# (layout, licence, page, file -> name and URL, (config, parameters, *changes) -> file -> published)
_TABLE: list[tuple[str, str, str, Callable, dict[tuple, dict[str, str]]]] = [
    (
        "Detectron2",
        "CC BY-SA 3.0",
        "https://github.com/facebookresearch/detectron2/blob/main/MODEL_ZOO.md",
        _named("detectron2://Misc/{}.pkl", ""),
        {
            (f"{_MASK}R_50_FPN_gn_3x", 45.7): {
                "mask_rcnn_R_50_FPN_3x_gn/138602888/model_final_dc5d9e": "42.6 / 38.6"
            },
            (f"{_SCRATCH}3x", 45.7): {
                "scratch_mask_rcnn_R_50_FPN_3x_gn/138602908/model_final_01ca85": "39.9 / 36.6"
            },
            (f"{_SCRATCH}9x", 45.7): {
                "scratch_mask_rcnn_R_50_FPN_9x_gn/183808979/model_final_da7b4c": "43.7 / 39.6"
            },
        },
    ),
    (
        "Detectron",
        "Apache-2.0",
        "https://github.com/facebookresearch/Detectron/tree/main/projects/GN",
        _named("detectron://{}", ""),
        {
            (f"{_DETECTRON}R_50_FPN_gn_2x", 45.7): {
                "e2e_mask_rcnn_R-50-FPN_2x_gn": "40.3 / 35.7",
                "e2e_mask_rcnn_R-50-FPN_3x_gn": "40.8 / 36.1",
            },
            (f"{_DETECTRON}R_101_FPN_gn_2x", 64.7): {
                "e2e_mask_rcnn_R-101-FPN_2x_gn": "41.8 / 36.8",
                "e2e_mask_rcnn_R-101-FPN_3x_gn": "42.3 / 37.2",
            },
            (f"{_MASK}R_50_FPN_gn_3x", 25.6): {"R-50-GN": "76.0 %"},
            (f"{_MASK}R_101_FPN_gn_3x", 44.5): {"R-101-GN": "77.4 %"},
        },
    ),
    (
        "mmdetection",
        "Apache-2.0",
        "https://github.com/open-mmlab/mmdetection/tree/main/configs/gn",
        _mmdetection,
        {
            (f"{_MASK}R_50_FPN_gn_2x", 45.7): {
                "gn/mask_rcnn_r50_fpn_gn-all_2x_coco 20200206-8eee02a6": "40.2 / 36.4",
                "gn/mask_rcnn_r50_fpn_gn-all_3x_coco 20200214-8b23b1e5": "40.5 / 36.7",
            },
            (f"{_MASK}R_50_FPN_gn_a1h_3x", 45.7): {
                "gn/mask_rcnn_r50_fpn_gn-all_contrib_2x_coco 20200207-20d3e849": "40.0 / 36.1",
                "gn/mask_rcnn_r50_fpn_gn-all_contrib_3x_coco 20200225-542aefbc": "40.1 / 36.2",
            },
            (f"{_MASK}R_101_FPN_gn_2x", 64.7): {
                "gn/mask_rcnn_r101_fpn_gn-all_2x_coco 20200205-d96b1b50": "41.9 / 37.6",
                "gn/mask_rcnn_r101_fpn_gn-all_3x_coco 20200513_181609-0df864f4": "42.1 / 38.0",
            },
        },
    ),
    (
        "mmdetection",
        "Apache-2.0",
        "https://github.com/open-mmlab/mmdetection/tree/main/configs/gn+ws",
        _mmdetection,
        {
            (f"{_BOX}R_50_FPN_gn_ws_1x", 43.1): {
                "gn+ws/faster_rcnn_r50_fpn_gn_ws-all_1x_coco 20200130-613d9fe2": "39.7"
            },
            (f"{_BOX}R_101_FPN_gn_ws_1x", 62.1): {
                "gn+ws/faster_rcnn_r101_fpn_gn_ws-all_1x_coco 20200205-a93b0d75": "41.7"
            },
            (f"{_BOX}X_50_32x4d_FPN_gn_ws_1x", 42.5): {
                "gn+ws/faster_rcnn_x50_32x4d_fpn_gn_ws-all_1x_coco 20200203-839c5d9d": "40.7"
            },
            (f"{_BOX}X_101_32x4d_FPN_gn_ws_1x", 61.7): {
                "gn+ws/faster_rcnn_x101_32x4d_fpn_gn_ws-all_1x_coco 20200212-27da1bc2": "42.1"
            },
            (f"{_MASK}R_50_FPN_gn_ws_2x", 45.7): {
                "gn+ws/mask_rcnn_r50_fpn_gn_ws-all_2x_coco 20200226-16acb762": "40.6 / 36.6",
                "gn+ws/mask_rcnn_r50_fpn_gn_ws-all_20_23_24e_coco 20200213-487d1283": "41.1 / 37.1",
            },
            (f"{_MASK}R_101_FPN_gn_ws_2x", 64.7): {
                "gn+ws/mask_rcnn_r101_fpn_gn_ws-all_2x_coco 20200212-ea357cd9": "42.0 / 37.7",
                "gn+ws/mask_rcnn_r101_fpn_gn_ws-all_20_23_24e_coco 20200213-57b5a50f": (
                    "43.1 / 38.6"
                ),
            },
            (f"{_MASK}X_50_32x4d_FPN_gn_ws_2x", 45.2): {
                "gn+ws/mask_rcnn_x50_32x4d_fpn_gn_ws-all_2x_coco 20200216-649fdb6f": "41.1 / 37.0",
                "gn+ws/mask_rcnn_x50_32x4d_fpn_gn_ws-all_20_23_24e_coco 20200226-969bcb2c": (
                    "42.1 / 38.0"
                ),
            },
            (f"{_MASK}X_101_32x4d_FPN_gn_ws_2x", 64.3): {
                "gn+ws/mask_rcnn_x101_32x4d_fpn_gn_ws-all_2x_coco 20200319-33fb95b5": "42.1 / 37.9",
                "gn+ws/mask_rcnn_x101_32x4d_fpn_gn_ws-all_20_23_24e_coco 20200316-e6cd35ef": (
                    "42.7 / 38.5"
                ),
            },
        },
    ),
    (
        "mmdetection",
        "Apache-2.0",
        "https://github.com/open-mmlab/mmdetection/tree/main/configs/scratch",
        _mmdetection,
        {
            ("COCO-Detection/scratch_faster_rcnn_R_50_FPN_gn_6x", 43.1, *_RGB): {
                "scratch/faster_rcnn_r50_fpn_gn-all_scratch_6x_coco "
                "scratch_faster_rcnn_r50_fpn_gn_6x_bbox_mAP-0.407_20200201_193013-90813d01": "40.7"
            },
            (f"{_SCRATCH}6x", 45.7, *_RGB): {
                "scratch/mask_rcnn_r50_fpn_gn-all_scratch_6x_coco scratch_mask_rcnn_r50_fpn_gn_6x_"
                "bbox_mAP-0.412__segm_mAP-0.374_20200201_193051-1e190a40": "41.2 / 37.4"
            },
        },
    ),
    (
        "tensorpack",
        "Apache-2.0",
        "https://github.com/tensorpack/tensorpack/tree/master/examples/FasterRCNN",
        _tensorpack,
        {
            (f"{_TENSORPACK}mask_rcnn_R_50_FPN_gn_2x", 45.7): {
                "COCO-MaskRCNN-R50FPN2xGN": "40.4 / 36.3"
            },
            (f"{_TENSORPACK}cascade_mask_rcnn_R_50_FPN_gn_4x", 76.0): {
                "COCO-MaskRCNN-R50FPN4xGNCasAug": "46.1 / 40.1"
            },
            (f"{_TENSORPACK}scratch_cascade_mask_rcnn_R_101_FPN_gn_9x", 95.0): {
                "COCO-MaskRCNN-R101FPN9xGNCasAugScratch": "47.7 / 41.7"
            },
        },
    ),
    (
        "tensorpack",
        "Apache-2.0",
        "https://github.com/ppwwyyxx/GroupNorm-reproduce/tree/master/ImageNet-ResNet-TensorFlow",
        _tensorpack,
        {
            (f"{_TENSORPACK}mask_rcnn_R_50_FPN_gn_2x", 25.6): {
                "ImageNet-R50-GroupNorm32-AlignPadding": "76.0 %"
            },
            (f"{_TENSORPACK}mask_rcnn_R_50_FPN_gn_2x", 44.5, "MODEL.RESNETS.DEPTH", 101): {
                "ImageNet-R101-GroupNorm32-AlignPadding": ""
            },
        },
    ),
    (
        "torchvision",
        "MIT",
        "https://github.com/joe-siyuan-qiao/pytorch-classification",
        _named("http://cs.jhu.edu/~syqiao/WeightStandardization/{}"),
        {
            (f"{_MASK}R_50_FPN_gn_ws_2x", 25.6): {"R-50-GN-WS.pth.tar": "76.3 %"},
            (f"{_MASK}R_101_FPN_gn_ws_2x", 44.5): {"R-101-GN-WS.pth.tar": "77.9 %"},
            (f"{_MASK}X_50_32x4d_FPN_gn_ws_2x", 25.0): {"X-50-GN-WS.pth.tar": "77.3 %"},
            (f"{_MASK}X_101_32x4d_FPN_gn_ws_2x", 44.2): {"X-101-GN-WS.pth.tar": "78.2 %"},
        },
    ),
    (
        "torchvision",
        "Apache-2.0",
        "https://github.com/ppwwyyxx/GroupNorm-reproduce/tree/master/ImageNet-ResNet-PyTorch",
        _named("https://github.com/ppwwyyxx/GroupNorm-reproduce/releases/download/v0.1/{}"),
        {(f"{_MASK}R_50_FPN_gn_a1h_3x", 25.6): {"ImageNet-ResNet50-GN.pth": "75.8 %"}},
    ),
    (
        "torchvision",
        "none stated",
        "https://github.com/chengyangfu/pytorch-groupnormalization",
        _named("http://www.cs.unc.edu/~cyfu/{}"),
        {
            (f"{_MASK}R_50_FPN_gn_a1h_3x", 25.5, *_channels_per_group(16)): {
                "resnet50_groupnorm16.tar": "75.9 %"
            },
            (f"{_MASK}R_50_FPN_gn_a1h_3x", 25.5, *_channels_per_group(32)): {
                "resnet50_groupnorm32.tar": "75.8 %"
            },
        },
    ),
    (
        "torchvision",
        "Apache-2.0",
        "https://github.com/huggingface/pytorch-image-models/blob/main/results/results-imagenet.csv",
        _timm,
        {(f"{_MASK}R_50_FPN_gn_a1h_3x", 25.6): {"resnet50_gn.a1h_in1k": "80.1 %"}},
    ),
    (
        "timm",
        "Apache-2.0",
        "https://github.com/huggingface/pytorch-image-models/blob/main/results/results-imagenet.csv",
        _timm,
        {
            (f"{_MASK}R_50d_v2_FPN_gn_3x", 25.6): {"resnetv2_50d_gn.ah_in1k": "80.8 %"},
            (_BIT, 25.5): {
                "resnetv2_50x1_bit.goog_in21k_ft_in1k": "80.4 %",
                "resnetv2_50x1_bit.goog_distilled_in1k": "82.8 %",
            },
            (_BIT, 68.3): {"resnetv2_50x1_bit.goog_in21k": ""},
            (_BIT, 217.3, *_bit(50, 3)): {"resnetv2_50x3_bit.goog_in21k_ft_in1k": "84.0 %"},
            (_BIT, 345.4, *_bit(50, 3)): {"resnetv2_50x3_bit.goog_in21k": ""},
            (_BIT, 44.5, *_bit(101, 1)): {"resnetv2_101x1_bit.goog_in21k_ft_in1k": "82.3 %"},
            (_BIT, 87.2, *_bit(101, 1)): {"resnetv2_101x1_bit.goog_in21k": ""},
            (_BIT, 387.9, *_bit(101, 3)): {"resnetv2_101x3_bit.goog_in21k_ft_in1k": "84.4 %"},
            (_BIT, 516.0, *_bit(101, 3)): {"resnetv2_101x3_bit.goog_in21k": ""},
            (_BIT, 236.3, *_bit(152, 2)): {
                "resnetv2_152x2_bit.goog_in21k_ft_in1k": "84.5 %",
                "resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k": "82.9 %",
                "resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k_384": "83.9 %",
            },
            (_BIT, 321.7, *_bit(152, 2)): {"resnetv2_152x2_bit.goog_in21k": ""},
            (_BIT, 936.5, *_bit(152, 4)): {"resnetv2_152x4_bit.goog_in21k_ft_in1k": "84.9 %"},
            (_BIT, 1107.3, *_bit(152, 4)): {"resnetv2_152x4_bit.goog_in21k": ""},
        },
    ),
]

PUBLIC = {
    named[0]: PublicWeights(*named, ap, size, f"{config}.yaml", tuple(changes), layout, *about)
    for layout, *about, name_and_url, rows in _TABLE
    for (config, size, *changes), files in rows.items()
    for file, ap in files.items()
    for named in [name_and_url(file)]
}
