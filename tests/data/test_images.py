"""Pixels against Detectron2's own read_image, and against the rule in float64."""

import numpy as np
import pytest
from detectron2.data import detection_utils
from image_files import with_orientation, write_png
from PIL import ExifTags, Image, ImageOps

from gn_detect.config import ConfigError
from gn_detect.data import DataError
from gn_detect.data.images import check_image_format, image_size, read_image, read_labels


def random_pixels(shape, high=256, dtype=np.uint8):
    pixels = np.random.default_rng(0).integers(0, high, shape)
    pixels.flat[:2] = 0, high - 1
    return pixels.astype(dtype)


@pytest.mark.parametrize(
    "mode, suffix",
    [
        *((mode, "png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("L", "jpg"), ("RGB", "jpg"), ("CMYK", "jpg"), ("RGB", "webp"), ("P", "gif")),
        *(("RGB", "avif"), ("RGB", "bmp"), ("RGB", "tif"), ("CMYK", "tif")),
    ],
)
def test_8_bits_are_read_as_detectron2_reads_them(tmp_path, mode, suffix):
    path = str(tmp_path / f"photo.{suffix}")
    image = Image.fromarray(random_pixels((12, 7, 3))).convert(mode)
    for orientation in (1,) if suffix in ("gif", "bmp", "tif") else range(1, 9):
        image.save(path, **({"exif": with_orientation(orientation)} if orientation > 1 else {}))
        for format in (None, "BGR", "RGB", "L", "YUV-BT.601"):
            expected = detection_utils.read_image(path, format)
            actual = read_image(path, format)
            assert actual.dtype == expected.dtype
            np.testing.assert_array_equal(actual, expected)
        assert image_size(path) == expected.shape[1::-1]


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_is_turned_once(tmp_path, compression):
    pixels, path = random_pixels((12, 7, 3)), str(tmp_path / "photo.tif")
    for orientation in range(1, 9):
        exif = with_orientation(orientation)
        Image.fromarray(pixels).save(path, exif=exif, compression=compression)
        stored = Image.fromarray(pixels)
        stored.getexif()[ExifTags.Base.Orientation] = orientation
        expected = np.asarray(ImageOps.exif_transpose(stored))
        np.testing.assert_array_equal(read_image(path, "RGB"), expected)
        assert image_size(path) == expected.shape[1::-1]


DEEP = {
    "16.png": random_pixels((12, 7), 65536, np.uint16),
    "16.tif": random_pixels((12, 7), 65536, np.uint16),
    "16.ppm": random_pixels((12, 7), 65536, np.uint16),
    "32.tif": random_pixels((12, 7), 65536, np.int32),
    "float.tif": np.random.default_rng(0).random((12, 7), dtype=np.float32),
}


@pytest.mark.parametrize("bit_depth_range", [(), (0, 65535), (-1000, 70000), [0.0, 65536.5]])
@pytest.mark.parametrize("name", DEEP)
def test_more_bits_are_scaled_to_8(tmp_path, name, bit_depth_range):
    pixels, path = DEEP[name], tmp_path / name
    Image.fromarray(pixels).save(path)
    low, high = bit_depth_range or ((0, 1) if name == "float.tif" else (0, 65535))
    exact = (pixels.astype(np.float64) - low) * 255 / (high - low)
    actual = read_image(str(path), "BGR", bit_depth_range=bit_depth_range)
    assert actual.dtype == np.uint8 and actual.shape == (12, 7, 3)
    assert np.abs(actual - exact[:, :, None]).max() <= 0.5 + 1e-4
    np.testing.assert_array_equal(
        read_image(str(path), bit_depth_range=bit_depth_range), actual[:, :, 0]
    )


def test_32_bits_that_differ_in_the_last_few(tmp_path):
    pixels = np.arange(2**30, 2**30 + 256, dtype=np.int32).reshape(16, 16)
    Image.fromarray(pixels).save(tmp_path / "32.tif")
    actual = read_image(str(tmp_path / "32.tif"), bit_depth_range=(2**30, 2**30 + 255))
    np.testing.assert_array_equal(actual, np.arange(256).reshape(16, 16))


def test_16_bits_are_turned_by_exif_behind_the_pixels(tmp_path):
    pixels, path = DEEP["16.png"], tmp_path / "16.png"
    write_png(path, pixels[:, :, None], orientation=6)
    actual = read_image(str(path))
    assert np.abs(actual - np.rot90(pixels / 257, -1)).max() <= 0.5 + 1e-4
    assert image_size(str(path)) == (12, 7)


@pytest.mark.parametrize(
    "pixels, bit_depth_range, message",
    [
        (np.array([[3, 4096]], np.uint16), (0, 4095), r"values of \(3, 4096\), beyond \(0, 4095\)"),
        (np.array([[-1, 5]], np.int32), (), r"values of \(-1, 5\), beyond \(0, 65535\)"),
        (np.array([[0, 70000]], np.int32), (), r"values of \(0, 70000\), beyond \(0, 65535\)"),
        (np.array([[0, 255]], np.float32), (), r"values of \(0, 255\), beyond \(0, 1\)"),
        (np.array([[0, np.nan]], np.float32), (0, 1), "NaN or infinite"),
        (np.array([[0, np.inf]], np.float32), (), "NaN or infinite"),
    ],
)
def test_values_beyond_the_range_are_refused(tmp_path, pixels, bit_depth_range, message):
    Image.fromarray(pixels).save(tmp_path / "deep.tif")
    with pytest.raises(DataError, match=rf"deep\.tif has .*{message}") as error:
        read_image(str(tmp_path / "deep.tif"), "BGR", bit_depth_range=bit_depth_range)
    assert "INPUT.BIT_DEPTH_RANGE" in str(error.value) or "replace" in str(error.value)


def test_colors_of_16_bits(tmp_path):
    pixels = random_pixels((12, 7, 3), 65536, np.uint16)
    write_png(tmp_path / "color.png", pixels)
    for accepted in ((), (0, 65535)):
        actual = read_image(str(tmp_path / "color.png"), "RGB", bit_depth_range=accepted)
        np.testing.assert_array_equal(actual, pixels >> 8)
    with pytest.raises(DataError, match=r"color\.png: INPUT.BIT_DEPTH_RANGE .* does not act"):
        read_image(str(tmp_path / "color.png"), "RGB", bit_depth_range=(0, 4095))


@pytest.mark.parametrize("bad", [(1, 0), (3,), (0, float("inf")), ("a", "b"), 255])
def test_what_is_no_range_is_refused(tmp_path, bad):
    Image.fromarray(DEEP["16.png"]).save(tmp_path / "16.png")
    with pytest.raises(ConfigError, match="INPUT.BIT_DEPTH_RANGE"):
        read_image(str(tmp_path / "16.png"), bit_depth_range=bad)


def test_labels_are_those_of_detectron2_or_refused(tmp_path):
    path, labels = str(tmp_path / "labels.png"), random_pixels((12, 7))
    for image in (labels, labels.astype(np.uint16)):
        Image.fromarray(image).save(path)
        expected = detection_utils.read_image(path, "L").squeeze(2)
        np.testing.assert_array_equal(expected, labels)
        np.testing.assert_array_equal(read_labels(path), expected)
    Image.fromarray(labels.astype(np.uint16) + 45).save(path)
    with pytest.raises(DataError, match=r"labels\.png has semantic labels of \(45, 300\); "):
        read_labels(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["avif", "bmp", "gif", "jp2", "jpg", "png", "tif", "webp"])
def test_damage_of_any_kind_is_said_in_a_sentence(tmp_path, suffix):
    path, rng = tmp_path / f"photo.{suffix}", np.random.default_rng(0)
    Image.fromarray(random_pixels((40, 60, 3))).save(path)
    whole, refused = path.read_bytes(), 0
    for _ in range(60):
        data = bytearray(whole[: rng.integers(1, len(whole))])
        data[rng.integers(len(data))] ^= 255
        path.write_bytes(data)
        try:
            read_image(str(path), "BGR")
        except DataError as error:
            refused += str(path) in str(error)
    assert refused > 40


def test_a_format_that_models_cannot_take_is_refused():
    for usable in ("BGR", "RGB", "L", "HSV", "RGBA", None):
        check_image_format(usable)
    for unusable in ("YUV-BT.601", "F", "I", "1", "P", "bgr", 3):
        with pytest.raises(ConfigError, match=f"INPUT.FORMAT .* is {unusable!r}; it must be BGR"):
            check_image_format(unusable)
