"""Copy-paste and colour jitter, against images whose colours tell which object a pixel shows."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import BitMasks, BoxMode
from helpers import config
from PIL import Image
from pycocotools import mask as mask_util
from torchvision.transforms.v2 import functional

from gn_detect.config import ConfigError
from gn_detect.data import augment
from gn_detect.data.augment import AugmentedDataset, jitter_colors
from gn_detect.data.coco import register_coco_json
from gn_detect.data.loader import (
    NamingDatasetMapper,
    build_train_loader,
    resumable_train_loader,
)

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
SIZES = [(40, 60), (60, 40), (50, 50), (30, 64), (64, 30)]  # height, width
CROWD = 200


def write_images(directory, kind: str) -> list[dict]:
    """One image of each of ``SIZES`` and what is in it, in Detectron2's format. Object ``n`` of
    image ``i`` has red ``10 * i + n + 1`` and the class ``n``, the crowd region ``CROWD``; all have
    green ``i + 1``, the background 0. Objects hide others ("RLE"), or are disjoint ("polygon")."""
    draw, dicts = np.random.default_rng(0), []
    for i, (height, width) in enumerate(SIZES):
        pixels = np.zeros((height, width, 3), np.uint8)
        reds = [*range(10 * i + 1, 10 * i + 5), CROWD]
        for n, red in enumerate(reds):
            top, left = (n * 6, 0) if kind == "polygon" else draw.integers(0, 20, 2)
            bottom, right = top + draw.integers(2, 6 if kind == "polygon" else 12), 2 * left + 10
            if n == 0:  # large enough to hide others
                bottom, right = top + 6, 30
            pixels[top:bottom, left:right] = red, i + 1, 0
        annotations = []
        for n, red in enumerate(reds):
            rle = mask_util.encode(np.asfortranarray(pixels[..., 0] == red))
            x, y, w, h = box = mask_util.toBbox(rle).tolist()
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            mask = rle if kind == "RLE" or red == CROWD else polygon
            annotation = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": n}
            annotations.append({**annotation, "segmentation": mask, "iscrowd": int(red == CROWD)})
        Image.fromarray(pixels).save(directory / f"{i}.png")
        file = {"file_name": str(directory / f"{i}.png"), "height": height, "width": width}
        dicts.append({**file, "annotations": [a for a in annotations if a["bbox"][2]]})
    return dicts


def flipping(mask_format="bitmask", **arguments):
    """A mapper that leaves pixels as they are."""
    flips = [T.RandomFlip(), T.RandomFlip(horizontal=False, vertical=True)]
    given = {"image_format": "RGB", "instance_mask_format": mask_format, "use_instance_mask": True}
    return NamingDatasetMapper(True, augmentations=flips, **given | arguments)


@pytest.fixture
def dicts(tmp_path):
    return write_images(tmp_path, "RLE")


def pasting(dicts, mapper, color_jitter=0.0):
    return AugmentedDataset(dicts, mapper, copy_paste=True, color_jitter=color_jitter)


def counts(red: torch.Tensor) -> dict[int, int]:
    """Red of an object -> pixels that show it."""
    values, numbers = red.unique(return_counts=True)
    pairs = zip(values.tolist(), numbers.tolist(), strict=True)
    return {value: number for value, number in pairs if value not in (0, CROWD)}


@pytest.mark.parametrize("kind, mask_format", [("RLE", "bitmask"), ("polygon", "polygon")])
def test_each_mask_covers_exactly_the_pixels_that_show_its_object(tmp_path, kind, mask_format):
    dicts, mapper = write_images(tmp_path, kind), flipping(mask_format)
    whole = {}
    for photo in dicts:
        whole |= counts(mapper(photo)["image"][0])
    np.random.seed(0)
    dataset, pasted, cut, hidden = pasting(dicts, mapper), 0, 0, 0
    for index in list(range(len(dicts))) * 30:
        sample = dataset[index]
        red, green = sample["image"][:2]
        instances = sample["instances"]
        assert tuple(red.shape) == instances.image_size == SIZES[index]
        assert set(green[red == CROWD].tolist()) <= {index + 1}  # no crowd of another image
        masks = instances.gt_masks
        if not isinstance(masks, BitMasks):  # nothing was pasted
            masks = BitMasks.from_polygon_masks(masks, *SIZES[index])
        assert torch.equal(instances.gt_boxes.tensor, masks.get_bounding_boxes().tensor)
        found = set()
        for mask, category in zip(masks, instances.gt_classes, strict=True):
            (shown,) = red[mask].unique().tolist()
            assert torch.equal(mask, red == shown)
            assert category == shown % 10 - 1
            found.add(shown)
        assert len(found) == len(instances)
        visible = counts(red)
        assert found == {r for r in visible if visible[r] >= 0.1 * whole[r]}
        pasted += len([r for r in found if r // 10 != index])
        cut += len([r for r in found if visible[r] < whole[r]])
        hidden += len([r for r in whole if r // 10 == index and r not in found])
    assert min(pasted, cut) > 100 and hidden


def test_objects_are_pasted_into_images_of_none_and_labels_with_them(dicts, tmp_path):
    for i, photo in enumerate(dicts):
        pixels = np.asarray(Image.open(photo["file_name"]))
        Image.fromarray(pixels[..., 0]).save(tmp_path / f"labels{i}.png")
        photo["sem_seg_file_name"] = str(tmp_path / f"labels{i}.png")
    dicts[0]["annotations"] = [a for a in dicts[0]["annotations"] if a["iscrowd"]]
    np.random.seed(0)
    dataset = pasting(dicts, flipping())
    seen = [len(dataset[0]["instances"]) for _ in range(20)]
    assert min(seen) == 0 < max(seen)
    for index in list(range(len(dicts))) * 5:
        sample = dataset[index]
        assert torch.equal(sample["sem_seg"], sample["image"][0].long())


@pytest.mark.parametrize("copy_paste", [True, False])
def test_a_closed_sample_is_that_of_the_mapper(dicts, copy_paste):
    mapper = flipping()
    dataset = AugmentedDataset(dicts, mapper, copy_paste=copy_paste, color_jitter=0.5)
    for index, photo in enumerate(dicts):
        samples = []
        for load in (lambda: dataset[~index], lambda: mapper(photo)):  # noqa: B023
            np.random.seed(3)
            samples.append(load())
        assert torch.equal(samples[0]["image"], samples[1]["image"])
        masks = [sample["instances"].gt_masks.tensor for sample in samples]
        assert torch.equal(*masks)


def test_the_image_and_what_is_pasted_are_jittered(monkeypatch, dicts):
    def jitter(image, strength, image_format):
        assert (strength, image_format) == (0.5, "RGB")
        return image + torch.tensor([0, 0, 7], dtype=torch.uint8)[:, None, None]

    monkeypatch.setattr(augment, "jitter_colors", jitter)
    np.random.seed(0)
    dataset = pasting(dicts, flipping(), color_jitter=0.5)
    assert {blue for i in range(5) for blue in dataset[i]["image"][2].unique().tolist()} == {7}


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_know_from_which_batch_on_it_is_closed(dicts, workers):
    loader = resumable_train_loader(
        dicts, mapper=flipping(), total_batch_size=2, num_workers=workers, copy_paste=True
    )
    sampler = loader.dataset.sampler
    assert sampler.close == 0.15
    sampler.start, sampler.closed_from = 4, 24
    foreign = []
    for batch in itertools.islice(loader, 40):
        images = {dicts[i]["file_name"]: i for i in range(len(dicts))}
        own = [{0, images[sample["file_name"]] + 1} for sample in batch]
        green = [set(sample["image"][1].unique().tolist()) for sample in batch]
        foreign.append(any(g - o for g, o in zip(green, own, strict=True)))
    assert sum(foreign[:20]) > 10 and not any(foreign[20:])


def test_the_keys_of_a_config(coco_files):
    coco_files.write()
    register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))
    base = ("DATASETS.TRAIN", ("own",), "SOLVER.IMS_PER_BATCH", 1, "INPUT.CLOSE_AUGMENTATION", 0.2)
    plain = build_train_loader(config(MASK_RCNN, *base)).dataset
    assert not isinstance(plain.dataset, AugmentedDataset) and plain.sampler.close == 0
    for key, value in (("COPY_PASTE.ENABLED", True), ("COLOR_JITTER", 0.3)):
        loader = build_train_loader(config(MASK_RCNN, *base, f"INPUT.{key}", value)).dataset
        given = {"COPY_PASTE.ENABLED": False, "COLOR_JITTER": 0.0, key: value}
        assert [loader.dataset.copy_paste, loader.dataset.color_jitter] == [*given.values()]
        assert loader.dataset.image_format == "BGR" and loader.sampler.close == 0.2


def test_without_them_the_samples_are_those_of_detectron2s_loader(dicts):
    batches = []
    for build in (build_detection_train_loader, resumable_train_loader):
        np.random.seed(1)
        arguments = {"total_batch_size": 1, "sampler": TrainingSampler(len(dicts), seed=2)}
        loader = build(dicts, mapper=flipping(), **arguments, aspect_ratio_grouping=False)
        batches.append([batch[0] for batch in itertools.islice(loader, 8)])
    for expected, actual in zip(*batches, strict=True):
        assert torch.equal(actual["image"], expected["image"])
        masks = [sample["instances"].gt_masks.tensor for sample in (expected, actual)]
        assert torch.equal(*masks)


CHANGES = ["brightness", "contrast", "saturation"]


@pytest.mark.parametrize("image_format", ["RGB", "BGR", "L"])
@pytest.mark.parametrize("factor", [0.7, 1.3])
@pytest.mark.parametrize("change", CHANGES)
def test_colors_change_as_torchvision_changes_them(monkeypatch, image_format, factor, change):
    image = torch.randint(60, 190, (3, 40, 30), generator=torch.manual_seed(0), dtype=torch.uint8)
    drawn = np.zeros(3)
    drawn[CHANGES.index(change)] = factor - 1
    monkeypatch.setattr(augment.np.random, "uniform", lambda low, high, n=0: drawn if n else 0.0)
    order = {"RGB": [0, 1, 2], "BGR": [2, 1, 0], "L": [0]}[image_format]
    expected = getattr(functional, f"adjust_{change}")(image[sorted(order)], factor)[order]
    actual = jitter_colors(image[order], 0.4, image_format)
    assert actual.dtype == torch.uint8
    assert (actual.int() - expected.int()).abs().max() <= 1


def test_hue_turns_colors_about_the_axis_of_grays(monkeypatch):
    third = 10 / 3
    monkeypatch.setattr(
        augment.np.random, "uniform", lambda low, high, n=0: np.zeros(n) if n else third
    )
    image = torch.tensor([[200, 50], [30, 50], [90, 50]], dtype=torch.uint8)[:, None]
    assert jitter_colors(image, 0.4, "RGB")[:, 0].T.tolist() == [[90, 200, 30], [50, 50, 50]]


def test_the_strength_bounds_what_is_drawn():
    image = torch.full((3, 2, 2), 100, dtype=torch.uint8)  # gray: contrast and hue leave it
    np.random.seed(0)
    values = [jitter_colors(image, 0.3, "RGB")[0, 0, 0].item() for _ in range(200)]
    assert 70 <= min(values) < 75 and 125 < max(values) <= 130
    assert torch.equal(jitter_colors(image, 0.0, "RGB"), image)


@pytest.mark.parametrize(
    "mapper, arguments, message",
    [
        ({"use_instance_mask": False}, {}, "INPUT.COPY_PASTE.ENABLED .* masks.*MODEL.MASK_ON"),
        ({"use_keypoint": True}, {}, "INPUT.COPY_PASTE.ENABLED .* keypoints .*MODEL.KEYPOINT_ON"),
        ({"precomputed_proposal_topk": 5}, {}, "COPY_PASTE.* proposals .*MODEL.LOAD_PROPOSALS"),
        ({}, {"color_jitter": 1.0}, "INPUT.COLOR_JITTER .* is 1.0; .* below 1"),
        ({}, {"color_jitter": -0.1}, "INPUT.COLOR_JITTER .* is -0.1"),
        ({"image_format": "HSV"}, {"color_jitter": 0.1}, "in RGB, BGR, L, and INPUT.FORMAT is HSV"),
        ({}, {"close_augmentation": 1.5}, "INPUT.CLOSE_AUGMENTATION .*the share 1.5"),
        ({}, {"dataset": torch.utils.data.TensorDataset()}, "the data is a TensorDataset"),
    ],
)
def test_what_cannot_be_is_refused(dicts, mapper, arguments, message):
    given = {"dataset": dicts, "copy_paste": True, **arguments}
    with pytest.raises(ConfigError, match=message):
        resumable_train_loader(mapper=flipping(**mapper), total_batch_size=1, **given)
