import copy
import errno
import io
import itertools

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.detection_utils import read_image
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import Boxes, BoxMode, Instances, PolygonMasks
from helpers import config
from image_files import with_orientation
from PIL import Image
from pycocotools import mask as mask_util

from gn_detect.config import ConfigError
from gn_detect.data import DataError, images
from gn_detect.data.coco import register_coco_json
from gn_detect.data.loader import (
    NamingDatasetMapper,
    _orientation,
    build_test_loader,
    build_train_loader,
)
from gn_detect.data.sampler import ResumableSampler

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
SIZES = [(100, 60), (60, 100), (50, 50), (120, 40), (40, 120), (30, 90), (90, 30)]
GROUPS = [_orientation({"width": w, "height": h}) for w, h in SIZES]


def detectron2_batches(batch_size, seed):
    """The image numbers of the batches that Detectron2's own loader makes."""
    images = (
        {"width": SIZES[i][0], "height": SIZES[i][1], "id": i}
        for i in TrainingSampler(len(SIZES), seed=seed)
    )
    for batch in AspectRatioGroupedDataset(images, batch_size):
        yield [d["id"] for d in batch]


@pytest.fixture
def own(coco_files):
    """``own(*opts)``: a config to train on the three images of ``coco_files``."""

    def build(*opts):
        coco_files.write()
        register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))
        return config(MASK_RCNN, "DATASETS.TRAIN", ("own",), "SOLVER.IMS_PER_BATCH", 1, *opts)

    return build


def take(sampler, count: int) -> list[int]:
    return list(itertools.islice(sampler, count))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 25])
def test_the_batches_of_detectron2_from_any_on(batch_size, start):
    sampler = ResumableSampler(TrainingSampler(len(SIZES), seed=5), GROUPS, batch_size)
    sampler.start = start
    indices = take(sampler, 12 * batch_size)
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    expected = itertools.islice(detectron2_batches(batch_size, 5), start, start + 12)
    assert batches == list(expected)


@pytest.mark.parametrize(
    "kind", ["", "RepeatFactor", "RandomSubset", "Weighted", "WeightedCategory"]
)
def test_every_sampler_of_detectron2_is_continued(own, kind):
    cfg = own("SOLVER.IMS_PER_BATCH", 2, "DATALOADER.REPEAT_THRESHOLD", 0.9)
    cfg.DATALOADER.SAMPLER_TRAIN = f"{kind}TrainingSampler"
    # Read, but not among the defaults of every Detectron2.
    cfg.DATALOADER.RANDOM_SUBSET_RATIO, cfg.DATASETS.TRAIN_REPEAT_FACTOR = 0.7, [["own", 1.5]]

    def build(seed):
        np.random.seed(seed)
        return build_train_loader(cfg).dataset.sampler

    first, other = build(1), build(2)
    state = first.state_dict()
    torch.save(state, buffer := io.BytesIO())
    buffer.seek(0)
    expected = take(first, 40)
    assert take(other, 40) != expected
    assert other.load_state_dict(torch.load(buffer, weights_only=True)) == ""
    other.start = 10
    assert take(other, 20) == expected[20:]


@pytest.mark.parametrize("orientation", [1, 4, 5, 8])
def test_the_header_tells_the_orientation_of_an_image_without_a_size(tmp_path, orientation):
    for size in SIZES:
        image = Image.new("RGB", size)
        image.save(tmp_path / "photo.jpg", exif=with_orientation(orientation))
        height, width, _ = read_image(str(tmp_path / "photo.jpg"), "BGR").shape
        assert _orientation({"file_name": str(tmp_path / "photo.jpg")}) == int(width > height)


def names(loader, count=6):
    return {image["file_name"][-5:] for batch in itertools.islice(loader, count) for image in batch}


def test_a_dataset_that_leaves_the_size_to_the_mapper(own):
    cfg = own()
    dicts = DatasetCatalog.get("own")
    for image in dicts:
        del image["width"], image["height"]
    DatasetCatalog.remove("own")
    DatasetCatalog.register("own", lambda: dicts)
    assert names(build_train_loader(cfg)) == {"1.png", "2.png", "3.png"}
    (image,) = next(iter(build_test_loader(cfg, "own")))
    assert (image["height"], image["width"]) == (64, 64)


def test_images_without_objects_are_trained_on_if_the_config_says_so(own, coco_files):
    coco_files.content["annotations"].pop()
    key = "DATALOADER.FILTER_EMPTY_ANNOTATIONS"
    assert names(build_train_loader(own())) == {"1.png", "2.png"}
    assert names(build_train_loader(own(key, False))) == {"1.png", "2.png", "3.png"}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.EMFILE, "Too many open files"),
        ModuleNotFoundError("No module named 'shapely'"),
    ],
)
@pytest.mark.parametrize("place", [(images, "convert_PIL_to_numpy"), (T, "AugInput")])
def test_what_is_no_fault_of_an_image_is_raised_as_it_is(own, monkeypatch, place, error):
    def fail(*args, **kwargs):
        raise error

    loader = build_test_loader(own(), "own")
    monkeypatch.setattr(*place, fail)
    with pytest.raises(type(error)) as raised:
        list(loader)
    assert raised.value is error


@pytest.mark.parametrize("damage", ["text", "truncated", "empty", "absent", "bomb", "size"])
def test_an_image_that_cannot_be_used_is_named(own, coco_files, monkeypatch, damage):
    path = coco_files.image_root / "2.png"
    if damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    elif damage == "size":
        coco_files.content["images"][1]["height"] = 65
    elif damage == "absent":
        path.unlink()
    else:
        data = {"text": b"not an image", "truncated": path.read_bytes()[:200], "empty": b""}
        path.write_bytes(data[damage])
    with pytest.raises(DataError, match=r"cannot use the image .*\.png .*; replace it"):
        list(build_test_loader(own(), "own"))


LSJ = ["INPUT.LSJ.ENABLED", True, "INPUT.LSJ.IMAGE_SIZE", 128, "INPUT.MIN_SIZE_TEST", 32]
MASKED = ["MODEL.GN.MASK_PADDING", True]
CROP = ["INPUT.CROP.ENABLED", True, "INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.CROP.TYPE"]
# BGR, polygon: a triangle, whose box depends on where it is cut, and a rectangle.
OBJECTS = [
    ((200, 0, 0), [6, 10, 46, 10, 6, 40]),
    ((0, 0, 200), [76, 50, 90, 50, 90, 60, 76, 60]),
]


@pytest.fixture
def photo(request, tmp_path):
    """A dataset dict of 96 x 64 pixels with ``OBJECTS`` on black; masks are polygons or RLE."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    annotations = []
    for number, (color, polygon) in enumerate(OBJECTS):
        rle = mask_util.frPyObjects([[float(v) for v in polygon]], 64, 96)[0]
        pixels[mask_util.decode(rle) == 1] = color
        annotations.append(
            {
                "bbox": mask_util.toBbox(rle).tolist(),
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": number,
                "segmentation": rle if getattr(request, "param", None) == "RLE" else [polygon],
            }
        )
    Image.fromarray(pixels[:, :, ::-1]).save(tmp_path / "photo.png")
    photo = {"file_name": str(tmp_path / "photo.png"), "height": 64, "width": 96}
    return {**photo, "annotations": annotations}


def mapper(*opts, is_train=True):
    np.random.seed(3)
    return NamingDatasetMapper(config(MASK_RCNN, *opts), is_train=is_train)


def jitter(low, high, *opts):
    return mapper(*LSJ, "INPUT.LSJ.MIN_SCALE", low, "INPUT.LSJ.MAX_SCALE", high, *opts)


def assert_same(actual, expected):
    """Of what a mapper returns."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, Instances):
        assert actual.image_size == expected.image_size
        assert_same(actual.get_fields(), expected.get_fields())
    elif isinstance(expected, Boxes):
        assert torch.equal(actual.tensor, expected.tensor)
    elif isinstance(expected, PolygonMasks):
        assert_same([list(map(list, p)) for p in actual], [list(map(list, p)) for p in expected])
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


@pytest.mark.parametrize("is_train", [True, False])
def test_a_photo_of_8_bits_is_mapped_as_detectron2_maps_it(photo, tmp_path, is_train):
    labels = np.random.default_rng(0).integers(0, 54, (64, 96), dtype=np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    photo["sem_seg_file_name"] = str(tmp_path / "labels.png")
    photo["proposal_boxes"] = np.array([[5.0, 5, 40, 40], [10, 10, 90, 60]])
    photo["proposal_objectness_logits"] = np.array([1.0, 0.5])
    photo["proposal_bbox_mode"] = BoxMode.XYXY_ABS
    before = copy.deepcopy(photo)
    cfg = config(MASK_RCNN, "MODEL.LOAD_PROPOSALS", True)
    results = []
    for kind in (DatasetMapper, NamingDatasetMapper):
        np.random.seed(3)
        results.append(kind(cfg, is_train=is_train)(photo))
    assert_same(*results)
    assert photo.keys() == before.keys() and photo["annotations"] == before["annotations"]
    Image.fromarray(labels.astype(np.uint16) + 250).save(tmp_path / "labels.png")
    with pytest.raises(DataError, match=r"labels\.png has the label 277; .* 0 to 254, "):
        mapper()(photo)


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("bit_depth_range", [(), (0, 4095)])
def test_a_photo_of_16_bits_is_trained_and_evaluated_on_as_its_8_bits(
    photo, tmp_path, is_train, bit_depth_range
):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96)).astype(np.uint16)
    opts = ["INPUT.BIT_DEPTH_RANGE", bit_depth_range]
    Image.fromarray(pixels.astype(np.uint8)).save(photo["file_name"])
    expected = mapper(is_train=is_train)(photo)["image"]
    step = 257 if bit_depth_range == () else 16  # 4095 is not a multiple of 255
    Image.fromarray(pixels * step).save(photo["file_name"])
    actual = mapper(*opts, is_train=is_train)(photo)["image"]
    assert (actual.float() - expected.float()).abs().max() <= (0 if step == 257 else 1)
    assert expected.float().std() > 30
    pixels[0, 0] = 65535
    Image.fromarray(pixels).save(photo["file_name"])
    if bit_depth_range:
        with pytest.raises(DataError, match=r"photo\.png has values .* 65535"):
            mapper(*opts, is_train=is_train)(photo)


def test_a_mapper_refuses_what_it_could_not_read():
    with pytest.raises(ConfigError, match="INPUT.FORMAT .* 'YUV-BT.601'; it must be one of BGR"):
        mapper("INPUT.FORMAT", "YUV-BT.601")
    with pytest.raises(ConfigError, match="INPUT.BIT_DEPTH_RANGE .* the lowest and the highest"):
        NamingDatasetMapper(
            is_train=True, augmentations=[], image_format="BGR", bit_depth_range=[1, 0]
        )


@pytest.mark.parametrize("photo", ["polygon", "RLE"], indirect=True)
@pytest.mark.parametrize(
    "opts",
    [
        [*LSJ, "INPUT.LSJ.MIN_SCALE", 0.4, "INPUT.LSJ.MAX_SCALE", 1.0],
        [*LSJ, "INPUT.LSJ.MIN_SCALE", 1.0, "INPUT.LSJ.MAX_SCALE", 2.0],
        [*LSJ, "INPUT.LSJ.MIN_SCALE", 0.6, "INPUT.LSJ.MAX_SCALE", 1.8, *MASKED],
        [*CROP, "relative", "INPUT.CROP.SIZE", (0.7, 0.5)],
        [*CROP, "relative_range", "INPUT.CROP.SIZE", (0.4, 0.4)],
    ],
)
def test_objects_move_with_the_pixels_and_are_cut_with_them(photo, opts):
    seen, apply = 0, mapper(*opts)
    for _ in range(10):
        result = apply(photo)
        pixels = result["image"].permute(1, 2, 0).numpy().astype(int)
        instances = result["instances"]
        assert pixels.shape[:2] == instances.image_size
        square = "INPUT.LSJ.ENABLED" in opts and "MODEL.GN.MASK_PADDING" not in opts
        assert instances.image_size == (128, 128) or not square
        for number, (color, _) in enumerate(OBJECTS):
            painted = np.abs(pixels - color).max(2) < 100
            (found,) = (instances.gt_classes == number).nonzero(as_tuple=True)
            if painted.sum() < 4:
                assert painted.any() or len(found) == 0  # at the rim, or cut away
                continue
            assert len(found) == 1
            mask = instances.gt_masks.tensor[found[0]].numpy()
            rim = 2 * (painted.any(0).sum() + painted.any(1).sum())
            assert (mask != painted).sum() <= rim
            ys, xs = painted.nonzero()
            expected = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert np.abs(instances.gt_boxes.tensor[found[0]].numpy() - expected).max() <= 3
            seen += 1
    assert seen >= 10


def test_large_scale_jitter_keeps_to_its_range(photo):
    """The width of the picture, where there is padding to the right of it, tells the scale."""
    photo["annotations"] = []
    scales, apply = [], jitter(0.25, 1.5)
    for _ in range(40):
        result = apply(photo)
        assert len(result["instances"]) == 0
        picture = (result["image"].numpy() != 128).any(0).any(0).sum()
        scales.append(picture / 128)  # at scale 1, the 96 pixels fill the square
    assert 0.25 - 0.01 <= min(scales) < 0.4
    cut = [s for s in scales if s == 1.0]
    assert 0.2 < len(cut) / len(scales) < 0.6  # 0.4 of the range is above 1
    assert len({round(s, 2) for s in scales}) > 20


def test_large_scale_jitter_does_not_pad_where_padding_is_masked(photo):
    """At half of the square's side, the 96 x 64 pixels are 64 x 43."""
    flips = ("INPUT.RANDOM_FLIP", "none")
    padded, masked = (jitter(0.5, 0.5, *flips, *opts)(photo) for opts in ((), MASKED))
    assert padded["instances"].image_size == (128, 128)
    assert masked["instances"].image_size == masked["image"].shape[1:] == (43, 64)
    assert torch.equal(masked["image"], padded["image"][:, :43, :64])
    masks, expected = (sample["instances"].gt_masks.tensor for sample in (masked, padded))
    assert torch.equal(masks, expected[:, :43, :64]) and masks.any(2).any(1).all()
    assert_same(masked["instances"].gt_boxes, padded["instances"].gt_boxes)


def test_large_scale_jitter_is_for_training_with_the_flips_of_the_config(photo):
    unflipped = jitter(1.0, 1.0, "INPUT.RANDOM_FLIP", "none")(photo)["instances"]
    assert unflipped.gt_boxes.tensor[0, 0] == pytest.approx(6 * 128 / 96, abs=1)
    assert mapper(*LSJ, is_train=False)(photo)["image"].shape == (3, 32, 48)
    boxes_only = jitter(0.5, 0.5, "MODEL.MASK_ON", False)(photo)["instances"]
    assert len(boxes_only) == 2 and not boxes_only.has("gt_masks")


def test_large_scale_jitter_with_another_crop_is_refused():
    with pytest.raises(ConfigError, match="INPUT.CROP.ENABLED"):
        mapper(*LSJ, *CROP, "relative")
