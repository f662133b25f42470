"""Image files before a run: every defect by its sentence, and what is kept for the next run."""

import ast
import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
from image_files import with_orientation, write_png
from PIL import Image

from gn_detect.config import ConfigError
from gn_detect.data import DataError, headers
from gn_detect.data.image_check import check_images
from gn_detect.data.images import read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gn_detect" / "headers"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.fromarray(PIXELS).save(tmp_path / "images" / f"good_{i}.jpg")
    return tmp_path / "images"


def check(root, *names, size=(60, 40), **kwargs) -> list[str]:
    names = names or sorted(os.listdir(root))
    widths, heights = (np.full(len(names), n) for n in size)
    return check_images("val.json", str(root), names, heights, widths, **kwargs)


def refusal(root, *names, **kwargs) -> str:
    with pytest.raises(DataError) as error:
        check(root, *names, **kwargs)
    assert str(error.value).startswith(f"val.json, images in {root}: ")
    assert "\n" not in str(error.value)
    return str(error.value)


def save(path: Path, pixels=PIXELS, orientation=1) -> bytes:
    Image.fromarray(pixels).save(path, exif=with_orientation(orientation))
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["avif", "bmp", "gif", "jp2", "jpg", "png", "tif", "webp"])
def test_a_file_that_is_cut_off_is_found(root, suffix):
    data = save(root / f"cut.{suffix}")
    assert check(root) == []
    (root / f"cut.{suffix}").write_bytes(data[: len(data) * 3 // 5])
    message = refusal(root)
    assert "1 image: " in message and f"cut.{suffix}" in message and "replace them" in message
    assert "truncated or damaged" in message or "no image that Pillow knows" in message


def test_bytes_behind_the_image_do_no_harm(root):
    for suffix in ("jpg", "png"):
        (root / f"long.{suffix}").write_bytes(save(root / f"long.{suffix}") + bytes(9))
    assert check(root) == []


def test_what_is_no_image_is_listed(root):
    (root / "empty.jpg").touch()
    for i in range(5):
        (root / f"page_{i}.jpg").write_bytes(b"\xef\xbb\xbf\n <!DOCTYPE html><html></html>")
    (root / "text.jpg").write_text("version https://git-lfs.github.com/spec/v1")
    (root / "folder.jpg").mkdir()
    (root / "link.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "pipe.jpg")
    message = refusal(root, *sorted(os.listdir(root)), "absent.jpg")
    for sentence in [
        "1 image: an empty file (empty.jpg)",
        "5 images: a web page (it starts with '<') (page_0.jpg, page_1.jpg, page_2.jpg, ...)",
        "1 image: no image that Pillow knows (text.jpg: starts with b'version http')",
        "1 image: a directory (folder.jpg)",
        "1 image: a link to a file that does not exist (link.jpg)",
        "1 image: a pipe or a device (pipe.jpg)",
        "1 image: cannot be read (No such file or directory) (absent.jpg)",
    ]:
        assert sentence in message
    assert "good" not in message


def fail_to_open(monkeypatch, number):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(headers, "_decode", fail)


def test_permissions_are_of_the_file_and_shortage_is_of_the_machine(root, monkeypatch):
    fail_to_open(monkeypatch, errno.EACCES)
    assert "5 images: cannot be read (Permission denied) (good_0.jpg, " in refusal(root)
    for number in (errno.EMFILE, errno.ENOMEM):
        fail_to_open(monkeypatch, number)
        with pytest.raises(OSError) as error:
            check(root)
        assert error.value.errno == number and not isinstance(error.value, DataError)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_the_size_is_that_of_the_pixels_that_are_trained_on(root, suffix):
    for orientation in range(1, 9):
        name = f"turned.{suffix}"
        save(root / name, orientation=orientation)
        height, width, _ = read_image(str(root / name)).shape
        notes = check(root, name, size=(width, height))
        assert len(notes) == (orientation > 1)
        assert all(f"1 image: an EXIF orientation, which is applied ({name})" in n for n in notes)
        if orientation >= 5:
            message = refusal(root, name)
            assert "declared with the size before their EXIF orientation is applied" in message
            assert f"({name} is 40 x 60, declared 60 x 40)" in message and "exiftool" in message


def test_an_orientation_behind_the_pixels_is_found(root):
    save(root / "turned.png")
    write_png(root / "16.png", PIXELS[:, :, :1], orientation=6)
    data, deep = ((root / name).read_bytes() for name in ("turned.png", "16.png"))
    (root / "turned.png").write_bytes(
        data[: data.index(b"IEND") - 4] + deep[deep.index(b"eXIf") - 4 :]
    )
    assert "(turned.png is 40 x 60, declared 60 x 40)" in refusal(root, "turned.png")


def test_another_size_than_declared(root):
    assert "good_0.jpg is 60 x 40, declared 61 x 40" in refusal(root, size=(61, 40))
    assert "5 images: declared with width and height swapped" in refusal(root, size=(40, 60))


def test_pixels_beyond_the_limits_of_pillow(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40 - 1)
    (note,) = check(root)
    assert "5 images: more than 2399 pixels" in note
    save(root / "large.png", np.zeros((80, 60), np.uint8))
    message = refusal(root)
    assert "1 image: more than 4798 pixels, which Pillow refuses" in message
    assert "(large.png)" in message


@pytest.mark.parametrize(
    "high, dtype, bit_depth_range, advice",
    [
        (65535, np.uint16, (), None),
        (9000, np.uint16, (), None),
        (4000, np.uint16, (), "set it to (0, 4095)"),
        (200, np.int32, (), "set it to (0, 255)"),
        (4000, np.uint16, (0, 4095), None),
        (0.05, np.float32, (), "set it to (0, 0.05000000074505806)"),
        (1, np.float32, (), None),
    ],
)
def test_the_rule_that_scales_to_8_bits_is_said(root, high, dtype, bit_depth_range, advice):
    save(root / "deep.tif", np.linspace(0, high, 2400).reshape(40, 60).astype(dtype))
    (note,) = check(root, bit_depth_range=bit_depth_range)
    range_ = bit_depth_range or ((0, 1) if dtype is np.float32 else (0, 65535))
    assert "1 image: " in note and f"of which {range_} is scaled to 8 bits" in note
    assert "INPUT.BIT_DEPTH_RANGE" in note and "(deep.tif)" in note
    assert advice in note if advice else "set it to" not in note
    if advice:  # which holds all values
        advised = ast.literal_eval(advice.removeprefix("set it to "))
        assert read_image(str(root / "deep.tif"), bit_depth_range=advised).std() > 50


def test_values_far_from_0_get_a_range_of_their_own(root):
    save(root / "heat.tif", np.linspace(29000, 31000, 2400).reshape(40, 60).astype(np.uint16))
    assert "set it to (29000, 31000)" in check(root)[0]


def test_values_beyond_the_range_are_listed(root):
    for value in (-5, 4095, 5000):
        save(root / f"{value}.tif", np.full((40, 60), value, np.int32))
    message = refusal(root, bit_depth_range=(0, 4095))
    assert "2 images: values beyond (0, 4095)" in message
    assert "(-5.tif has (-5, -5), 5000.tif has (5000, 5000))" in message
    assert "set INPUT.BIT_DEPTH_RANGE (" in message and "to (-5, 5000)" in message
    assert check(root, bit_depth_range=(-5, 5000))
    for value in (np.nan, np.inf):
        save(root / "0.tif", np.array([[0, value]], np.float32))
        assert "1 image: values that are NaN or infinite" in refusal(root, "0.tif", size=(2, 1))


def test_colors_of_16_bits(root):
    write_png(root / "dark.png", PIXELS.astype(np.uint16) * 16)
    (note,) = check(root)
    assert "1 image: of colors of 16 bits, Pillow takes the upper 8" in note
    assert "they stay below 4096, almost black" in note
    assert "1 image: INPUT.BIT_DEPTH_RANGE" in refusal(root, bit_depth_range=(0, 4095))
    write_png(root / "light.png", PIXELS.astype(np.uint16) * 256)
    for bit_depth_range in ((), (0, 65535)):
        (note,) = check(root, bit_depth_range=bit_depth_range)
        assert "2 images: " in note and "black" not in note


def test_the_range_is_checked_and_must_have_an_effect(root):
    (note,) = check(root, bit_depth_range=(0, 4095))
    assert "INPUT.BIT_DEPTH_RANGE" in note and "has no effect" in note
    save(root / "deep.png", PIXELS[:, :, 0].astype(np.uint16))
    with pytest.raises(ConfigError, match="INPUT.BIT_DEPTH_RANGE"):
        check(root, bit_depth_range=(5, 5))


def test_headers_are_kept_until_a_file_changes(root, cache, monkeypatch):
    save(root / "deep.png", PIXELS[:, :, 0].astype(np.uint16) * 9)
    save(root / "turned.jpg", orientation=3)
    notes, read, decode = check(root), [], headers._decode
    assert len(notes) == 2
    monkeypatch.setattr(headers, "_decode", lambda f: read.append(Path(f.name).name) or decode(f))
    assert check(root) == notes and read == []
    save(root / "good_1.jpg", PIXELS[:20])
    assert "good_1.jpg is 60 x 20, declared 60 x 40" in refusal(root)
    assert refusal(root, "good_1.jpg") in refusal(root)
    assert read == ["good_1.jpg"]
    (root / "good_1.jpg").write_bytes(b"")
    assert "an empty file (good_1.jpg)" in refusal(root)
    (file,) = cache.iterdir()
    save(root / "good_1.jpg")
    for damage in (b"", b"\x81", b"\x93\x01\x02\x03", file.read_bytes()[:50]):
        file.write_bytes(damage)
        read.clear()
        assert check(root) == notes and len(read) == len(os.listdir(root))
        assert list(cache.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_costs_a_warning(root, cache, caplog):
    cache.parent.mkdir(parents=True)
    cache.touch()  # a file where the directory would be
    assert check(root) == []
    assert "cannot be written" in caplog.text


def test_many_images_are_announced(root, monkeypatch, caplog):
    monkeypatch.setattr(headers, "_MANY", 4)
    monkeypatch.setattr(headers, "_CHUNK", 2)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with caplog.at_level("INFO"):
        assert check(root) == []
    assert f"reading the headers of 5 images in {root}" in caplog.text
