"""Pixels against Detectron2's own read_image, and against the rule in float64."""

import numpy as np
import pytest
from detectron2.data import detection_utils
from image_files import with_orientation, write_png
from PIL import ExifTags, Image, ImageOps

from gn_detect.config import ConfigError
from gn_detect.data import DataError
from gn_detect.data.headers import image_size
from gn_detect.data.images import check_image_format, read_image, read_labels


def random_pixels(shape, high=256, dtype=np.uint8):
    pixels = np.random.default_rng(0).integers(0, high, shape)
    pixels.flat[:2] = 0, high - 1
    return pixels.astype(dtype)


COLOR = random_pixels((12, 7, 3))


@pytest.mark.parametrize(
    "suffix, modes",
    [
        ("png", ("1", "L", "LA", "P", "RGB", "RGBA")),
        ("jpg", ("L", "RGB", "CMYK")),
        ("tif", ("RGB", "CMYK")),
        *((suffix, ["RGB"]) for suffix in ("webp", "gif", "avif", "bmp")),
    ],
)
def test_8_bits_are_read_as_detectron2_reads_them(tmp_path, suffix, modes):
    path = str(tmp_path / f"photo.{suffix}")
    orientations = [1] if suffix in ("gif", "bmp", "tif") else range(1, 9)
    for mode, orientation in ((m, o) for m in modes for o in orientations):
        Image.fromarray(COLOR).convert(mode).save(path, exif=with_orientation(orientation))
        for format in (None, "BGR", "RGB", "L", "YUV-BT.601"):
            expected = detection_utils.read_image(path, format)
            np.testing.assert_array_equal(read_image(path, format), expected, strict=True)
        assert image_size(path) == expected.shape[1::-1]


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_once(tmp_path, compression, orientation):
    stored, path = Image.fromarray(COLOR), str(tmp_path / "photo.tif")
    stored.save(path, exif=with_orientation(orientation), compression=compression)
    stored.getexif()[ExifTags.Base.Orientation] = orientation
    expected = np.asarray(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(read_image(path, "RGB"), expected)
    assert image_size(path) == expected.shape[1::-1]


U16 = random_pixels((12, 7), 65536, np.uint16)
I32 = 2**30 + np.arange(84, dtype=np.int32).reshape(12, 7)  # more digits than float32 has
F32 = np.random.default_rng(0).random((12, 7), dtype=np.float32)


@pytest.mark.parametrize(
    "suffix, pixels, bit_depth_range",
    [
        *((suffix, U16, ()) for suffix in ("png", "tif", "ppm")),
        ("png", U16, [-1000, 65536.5]),
        ("tif", U16.astype(np.int32), ()),
        ("tif", I32, (2**30, 2**30 + 83)),
        ("tif", F32, ()),
        ("tif", F32, (-1, 2)),
    ],
)
def test_more_bits_are_scaled_to_8(tmp_path, suffix, pixels, bit_depth_range):
    path = str(tmp_path / f"photo.{suffix}")
    Image.fromarray(pixels).save(path)
    low, high = bit_depth_range or ((0, 1) if pixels is F32 else (0, 65535))
    exact = (pixels.astype(np.float64) - low) * 255 / (high - low)
    actual = read_image(path, "BGR", bit_depth_range=bit_depth_range)
    assert actual.dtype == np.uint8 and actual.shape == (12, 7, 3)
    assert np.abs(actual - exact[:, :, None]).max() <= 0.5 + 1e-4
    np.testing.assert_array_equal(read_image(path, bit_depth_range=bit_depth_range), actual[..., 0])


@pytest.mark.parametrize(
    "pixels, bit_depth_range, sentence",
    [
        (np.uint16([[3, 4096]]), (0, 4095), r"\(3, 4096\), beyond \(0, 4095\)"),
        (np.int32([[-1, 5]]), (), r"\(-1, 5\), beyond \(0, 65535\)"),
        (np.float32([[0, 255]]), (), r"\(0.0, 255.0\), beyond \(0, 1\)"),
        (np.float32([[0, np.nan]]), (0, 1), r"\(nan, nan\), beyond"),
        *((U16, bad, None) for bad in ((1, 0), (3,), (0, np.inf), ("a", "b"), 255)),
    ],
)
def test_values_beyond_the_range_and_what_is_none(tmp_path, pixels, bit_depth_range, sentence):
    path, start = tmp_path / "deep.tif", f"tif has values of {sentence}.*" if sentence else ""
    Image.fromarray(pixels).save(path)
    with pytest.raises(DataError if sentence else ConfigError, match=f"{start}INPUT.BIT_DEPTH"):
        read_image(str(path), "BGR", bit_depth_range=bit_depth_range)


def test_colors_of_16_bits_and_a_turn_behind_the_pixels(tmp_path):
    pixels, path = random_pixels((12, 7, 3), 65536, np.uint16), str(tmp_path / "color.png")
    write_png(path, pixels, orientation=6)
    assert image_size(path) == (12, 7)
    for accepted in ((), (0, 65535)):
        actual = read_image(path, "RGB", bit_depth_range=accepted)
        np.testing.assert_array_equal(actual, np.rot90(pixels >> 8, -1))
    with pytest.raises(DataError, match=r"color\.png has colors .*whatever INPUT.BIT_DEPTH_RANGE"):
        read_image(path, "RGB", bit_depth_range=(0, 4095))


def test_labels_are_the_values_of_the_file_or_refused(tmp_path):
    path, labels = str(tmp_path / "labels.tif"), random_pixels((12, 7))
    palette = Image.fromarray(labels, "P")
    palette.putpalette(random_pixels(768).tolist())
    for image in (Image.fromarray(labels), Image.fromarray(labels.astype(np.uint16)), palette):
        image.save(path)
        np.testing.assert_array_equal(read_labels(path), labels)
    deep, half = np.uint16([[5, 300]]), np.float32([[1, 0.5]])
    for pixels, found in ((deep, "the label 300"), (half, "the label 0.5"), (COLOR, "colors")):
        Image.fromarray(pixels).save(path)
        with pytest.raises(DataError, match=rf"labels\.tif has {found}; .* 0 to 254, .* and 255"):
            read_labels(path)


@pytest.mark.parametrize("image_format", ["YUV-BT.601", "F", "I", "1", "P", "bgr", 3])
def test_a_format_that_models_cannot_take_is_refused(image_format):
    with pytest.raises(ConfigError, match=f"INPUT.FORMAT .* is {image_format!r}; it must be one"):
        check_image_format(image_format)
