"""Image files before a run: every defect by its sentence, and what is kept for the next run."""

import errno
import os
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from image_files import with_orientation, write_png
from PIL import Image

from gn_detect.config import ConfigError
from gn_detect.data import DataError, headers
from gn_detect.data.image_check import check_images
from gn_detect.data.images import read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)


def save(path: Path, pixels=PIXELS, orientation=1) -> bytes:
    Image.fromarray(pixels).save(path, exif=with_orientation(orientation))
    return path.read_bytes()


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for i in range(5):
        save(tmp_path / "images" / f"good_{i}.jpg")
    return tmp_path / "images"


def check(root, *names, size=(60, 40), **kwargs) -> list[str]:
    names = names or sorted(os.listdir(root))
    widths, heights = (np.full(len(names), n) for n in size)
    return check_images("val.json", str(root), names, heights, widths, **kwargs)


def refusal(root, *names, **kwargs) -> str:
    with pytest.raises(DataError) as error:
        check(root, *names, **kwargs)
    message = str(error.value)
    assert message.startswith(f"val.json, images in {root}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("suffix", ["avif", "bmp", "gif", "jp2", "jpg", "png", "tif", "webp"])
def test_a_file_that_is_cut_off_is_found_and_bytes_behind_do_no_harm(root, suffix):
    data = save(root / f"cut.{suffix}")
    (root / f"long.{suffix}").write_bytes(data + bytes(9))
    assert check(root) == []
    (root / f"cut.{suffix}").write_bytes(data[: len(data) * 3 // 5])
    assert re.search(rf"1 image: (truncated|unknown).* \(cut\.{suffix}: ", refusal(root))
    with pytest.raises(DataError, match=rf"cannot use the image .*cut\.{suffix} .*; replace it"):
        read_image(str(root / f"cut.{suffix}"), "BGR")


def test_what_is_no_image_is_listed(root):
    (root / "empty.jpg").touch()
    for i in range(5):
        (root / f"page_{i}.jpg").write_bytes(b"\xef\xbb\xbf\n <!DOCTYPE html><html></html>")
    (root / "text.jpg").write_text("version https://git-lfs.github.com/spec/v1")
    (root / "folder.jpg").mkdir()
    (root / "link.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "pipe.jpg")
    message = refusal(root, *sorted(os.listdir(root)), "absent.jpg")
    assert "good" not in message
    for sentence in [
        "1 image: an empty file (empty.jpg)",
        "5 images: a web page (it starts with '<') (page_0.jpg, page_1.jpg, page_2.jpg, ...)",
        "unknown to Pillow, or cut off (text.jpg: starts with b'version http')",
        "1 image: a directory (folder.jpg)",
        "1 image: a link to a file that does not exist (link.jpg)",
        "1 image: a pipe or a device (pipe.jpg)",
        "1 image: cannot be read (No such file or directory) (absent.jpg)",
    ]:
        assert sentence in message


def test_permissions_are_of_the_file_and_shortage_is_of_the_machine(root, monkeypatch):
    decode = Mock(side_effect=PermissionError(errno.EACCES, "denied"))
    monkeypatch.setattr(headers, "_decode", decode)
    assert "5 images: cannot be read (denied) (good_0.jpg, " in refusal(root)
    for decode.side_effect in (OSError(errno.EMFILE, "too many"), MemoryError("too many")):
        with pytest.raises(type(decode.side_effect), match="too many"):
            check(root)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_the_size_is_that_of_the_pixels_that_are_trained_on(root, suffix):
    for orientation in range(1, 9):
        name = f"turned.{suffix}"
        save(root / name, orientation=orientation)
        height, width, _ = read_image(str(root / name)).shape
        notes = check(root, name, size=(width, height))
        assert ["an EXIF orientation" in n for n in notes] == [True] * (orientation > 1)
        if orientation >= 5:
            assert re.search(r"size before their EXIF .*exiftool.* is 40 x 60", refusal(root, name))


def test_another_size_than_declared(root):
    assert "good_0.jpg is 60 x 40, declared 61 x 40" in refusal(root, size=(61, 40))
    assert "5 images: declared with width and height swapped" in refusal(root, size=(40, 60))
    write_png(root / "turned.png", PIXELS, orientation=6)  # said behind the pixels
    assert "(turned.png is 40 x 60, declared 60 x 40)" in refusal(root, "turned.png")


def test_pixels_beyond_the_limits_of_pillow(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40 - 1)
    assert "5 images: more than 2399 pixels" in check(root)[0]
    save(root / "large.png", np.zeros((80, 60), np.uint8))
    refused = "1 image: more than 4798 pixels, which Pillow refuses (cut it into tiles) (large.png)"
    assert refused in refusal(root)


@pytest.mark.parametrize(
    "high, bit_depth_range, scaled, contrast",
    [
        (np.uint16(9000), (), (0, 65535), True),
        (np.uint16(4000), (), (0, 65535), False),
        (np.uint16(4000), (0, 4095), (0, 4095), True),
        (np.float32(0.0625), (), (0, 1), False),
        (np.float32(1), (), (0, 1), True),
    ],
)
def test_the_rule_that_scales_to_8_bits_is_said(root, high, bit_depth_range, scaled, contrast):
    save(root / "deep.tif", np.linspace(0, high, 2400).reshape(40, 60).astype(high.dtype))
    (note,) = check(root, bit_depth_range=bit_depth_range)
    assert note.startswith("1 image: mode ") and note.endswith(" (deep.tif)")
    assert f"of which {scaled} is scaled to 8 bits (INPUT.BIT_DEPTH_RANGE " in note
    found = f"all values are {(high * 0).item(), high.item()}, and little contrast is left: set it"
    assert (found in note) != contrast


def test_values_beyond_the_range_are_listed(root):
    for value in (-5, 4095, 5000):
        save(root / f"{value}.tif", np.full((40, 60), value, np.int32))
        save(root / f"{value} f.tif", np.full((40, 60), np.nan if value == 4095 else 1, np.float32))
    message = refusal(root, bit_depth_range=(0, 4095))
    assert "2 images: values of (-5, 5000), beyond (0, 4095)" in message
    assert "set INPUT.BIT_DEPTH_RANGE (" in message and "(-5.tif, 5000.tif)" in message
    assert "1 image: values of (nan, nan), beyond (0, 4095)," in message


def test_colors_of_16_bits_and_none(root):
    assert "INPUT.BIT_DEPTH_RANGE (" in check(root, bit_depth_range=(0, 1))[0]  # without effect
    with pytest.raises(ConfigError, match="INPUT.BIT_DEPTH_RANGE"):
        check(root, bit_depth_range=(5, 5))
    write_png(root / "dark.png", PIXELS.astype(np.uint16) * 16)
    (note,) = check(root)
    assert re.match(r"1 image: mode 16-bit color, .*values are \(0, 3840\), .*: convert", note)
    assert "1 image: colors of 16 bits, of" in refusal(root, bit_depth_range=(0, 4095))
    write_png(root / "light.png", PIXELS.astype(np.uint16) * 256)
    (note,) = check(root, bit_depth_range=(0, 65535))
    assert "2 images: " in note and "contrast" not in note


def test_headers_are_kept_until_a_file_changes(root, monkeypatch, caplog):
    cache = root.parent / "cache" / "gn_detect" / "headers"
    cache.parent.mkdir(parents=True)
    cache.touch()  # a file where the directory would be
    assert check(root) == [] and "cannot be written" in caplog.text
    cache.unlink()
    save(root / "deep.png", PIXELS[:, :, 0].astype(np.uint16) * 9)
    save(root / "turned.jpg", orientation=3)
    notes, decode = check(root), Mock(side_effect=headers._decode)
    monkeypatch.setattr(headers, "_decode", decode)
    assert check(root) == notes and len(notes) == 2 and not decode.called
    save(root / "good_1.jpg", PIXELS[:20])
    for _ in range(2):
        assert "good_1.jpg is 60 x 20, declared 60 x 40" in refusal(root)
    assert decode.call_count == 1
    save(root / "good_1.jpg")
    (file,) = cache.iterdir()
    for damage in (b"", b"\x93\x01\x02\x03", file.read_bytes()[:50]):
        file.write_bytes(damage)
        decode.reset_mock()
        assert check(root) == notes and decode.call_count == len(os.listdir(root))
