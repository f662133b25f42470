import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
from PIL import Image

from gn_detect.config import ConfigError
from gn_detect.data.coco import DataError
from gn_detect.data.image_folder import ClassificationMapper, read_image_folder


@pytest.fixture
def folder(tmp_path):
    """An image of each of two classes: red, and left half green."""
    for name, color in (("b", (200, 0, 0)), ("a", (0, 200, 0))):
        (tmp_path / name).mkdir()
        pixels = np.zeros((20, 30, 3), np.uint8)
        pixels[:, : 30 if name == "b" else 15] = color
        Image.fromarray(pixels).save(tmp_path / name / "1.png")
    return tmp_path


def test_labels_are_the_places_of_the_sorted_names(folder):
    assert read_image_folder(str(folder)) == [
        {"file_name": str(folder / f"{name}/1.png"), "label": label}
        for label, name in enumerate("ab")
    ]


@pytest.mark.parametrize("image_format, channel", [("RGB", 0), ("BGR", 2)])
def test_pixels(folder, image_format, channel):
    half, red = read_image_folder(str(folder))
    mapper = ClassificationMapper([T.RandomHorizontalFlip(1.0), T.CenterCrop(10)], image_format)
    mapped = mapper(red)
    assert mapped["label"] == 1 and mapped["file_name"] == red["file_name"]
    expected = torch.zeros(3, 10, 10, dtype=torch.uint8)
    expected[channel] = 200
    assert torch.equal(mapped["image"], expected) and "image" not in red
    flipped = ClassificationMapper([T.RandomHorizontalFlip(1.0)], image_format)(half)["image"]
    assert flipped[1, :, :15].max() == 0 and flipped[1, :, 15:].min() == 200


def test_what_cannot_be_read(folder):
    with pytest.raises(ConfigError, match="'L'; known: BGR, RGB"):
        ClassificationMapper([], "L")
    with pytest.raises(DataError, match="absent: No such file .* a folder of images for each cl"):
        read_image_folder(str(folder / "absent"))
    (folder / "a/1.png").write_bytes(b"no image")
    image, _ = read_image_folder(str(folder))
    with pytest.raises(DataError, match=r"cannot use the image .*a.1\.png"):
        ClassificationMapper([])(image)
    (folder / "a/1.png").unlink()
    with pytest.raises(DataError, match="no valid file for the classes a"):
        read_image_folder(str(folder))
