"""A COCO JSON, decoded once into typed records (https://cocodataset.org/#format-data).

msgspec validates while it decodes, and names what does not fit. What has one meaning is brought
into one form here (96.0 is 96, a crowd of null is none); what has not is refused in a sentence.
"""

from __future__ import annotations

import codecs
import contextlib
import gc
import json
import re
import reprlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec

from . import DataError

NULL = msgspec.Raw(b"null")
_Id = int | float | str
T = TypeVar("T")


class Category(msgspec.Struct, gc=False):
    """A class, as the file has it.

    Attributes:
        id: a whole number, or text.
        keypoints: their names, in the order of the coordinates, where it is used.
        skeleton: pairs of keypoints that belong together, counted from 1, where it is used.
    """

    id: _Id
    name: str
    supercategory: Any = None
    keypoints: Any = None
    skeleton: Any = None


class Image(msgspec.Struct, gc=False):
    """An image, as the file has it; height and width in pixels."""

    id: _Id
    file_name: str
    height: int | float
    width: int | float


class Annotation(msgspec.Struct, gc=False):
    """An object or a crowd region; masks and keypoints, which not every run needs, as text."""

    image_id: _Id
    category_id: _Id
    bbox: tuple[float, float, float, float]
    id: Any = None
    iscrowd: bool | int | float | None = 0
    area: Any = None
    ignore: Any = 0
    keypoints: msgspec.Raw = NULL
    segmentation: msgspec.Raw = NULL


class CocoFile(msgspec.Struct, gc=False):
    """The three lists of a file; a test set has no ``annotations``."""

    images: list[Image]
    categories: list[Category]
    annotations: list[Annotation] | msgspec.UnsetType = msgspec.UNSET


_ITEMS = {"images": Image, "categories": Category, "annotations": Annotation}
_SINGULAR = {"images": "image", "categories": "category", "annotations": "annotation"}

# What each field must be, in words.
_MEANING = {
    "id": "a number or text",
    "file_name": "text, the path of the file below the directory of the images",
    "height": "a whole number of pixels",
    "width": "a whole number of pixels",
    "name": "text",
    "image_id": "the 'id' of an image",
    "category_id": "the 'id' of a category",
    "bbox": "four finite numbers x, y, width, height",
    "iscrowd": "0 or 1",
}


def decode_coco(json_file: str) -> CocoFile:
    """Decode ``json_file`` and check the types of all its items.

    Raises:
        DataError: the file cannot be read, is not JSON, or an item lacks a key or has one of
            another type; the message names the first of its kind, and counts them.
    """

    def decode(content: bytes | memoryview) -> CocoFile:
        try:
            return _decode(content)
        except msgspec.ValidationError:
            raise DataError(f"{json_file}{_explain(content)}") from None

    return decode_json(json_file, decode)


def decode_json(json_file: str, decode: Callable[[bytes | memoryview], T]) -> T:
    """What ``decode``, of msgspec, makes of the content of a file; numbers that are NaN or
    infinite, which JSON does not have, are null.

    Raises:
        DataError: the file cannot be read, or is not JSON in UTF-8; and what ``decode`` raises.
    """
    try:
        with open(json_file, "rb") as f:
            content: bytes | memoryview = f.read()
    except OSError as error:
        raise DataError(f"cannot read {json_file}: {error.strerror or error}") from None
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in content[:4]:
        raise DataError(f"{json_file} is text in UTF-16 or UTF-32; save it as UTF-8")
    if content[:3] == codecs.BOM_UTF8:
        content = memoryview(content)[3:]
    with paused_gc():
        try:
            try:
                return decode(content)
            except msgspec.DecodeError:  # Python writes NaN
                return decode(msgspec.json.encode(json.loads(str(content, "utf-8"))))
        except DataError:
            raise
        except UnicodeError as error:
            reason = f"is not text in UTF-8 ({error.reason}); save it as UTF-8"
        except ValueError as error:
            reason = f"is not valid JSON ({error}); is it truncated?"
        except RecursionError:
            reason = "has lists that are nested too deeply"
    raise DataError(f"{json_file} {reason}")


_decode = msgspec.json.Decoder(CocoFile).decode


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """Millions of small objects come to stay: looking for garbage among them takes longer than
    making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():  # so that they are old, and not looked through next
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def _explain(content: bytes | memoryview) -> str:
    """What msgspec found in ``content``, to follow the name of the file: msgspec gives the path of
    the first fault; here its item is named, and the others of its kind are counted."""
    try:
        lists = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        return " is not in COCO format: it is no object with the lists images, annotations, ..."
    for key, kind in _ITEMS.items():
        if key == "annotations" and key not in lists:
            continue
        try:
            items = msgspec.json.decode(lists[key], type=list[msgspec.Raw])
        except (KeyError, msgspec.ValidationError):
            return f" is not in COCO format: it has no list {key!r}"
        decode = msgspec.json.Decoder(kind).decode
        faults: dict[tuple[str, ...], list[int]] = {}
        for index, item in enumerate(items):
            try:
                decode(item)
            except msgspec.ValidationError as error:
                faults.setdefault(_fault(error), []).append(index)
        if faults:
            fault, indices = next(iter(faults.items()))
            item = msgspec.json.decode(items[indices[0]])
            if key == "annotations" and isinstance(item, dict):
                images = msgspec.json.decode(lists["images"], type=list[Image])
                names = [i.file_name for i in images if i.id == item.get("image_id")]
                item["file_name"] = names[0] if names else short(item.get("image_id"))
            text = _sentence(key, item, indices[0], *fault)
            return f": {text}" + others(len(indices) - 1, key)
    raise AssertionError("a file that decodes has nothing to explain")


def _fault(error: msgspec.ValidationError) -> tuple[str, str]:
    """The field that ``error`` names ("" for the item itself), and "" or that it is missing."""
    if missing := re.search(r"missing required field `(\w+)`(?! - at `\$\.)", str(error)):
        return missing[1], "missing"
    path = re.search(r"at `\$\.(\w+)", str(error))
    return (path[1] if path else ""), ""


def _sentence(key: str, item: Any, index: int, field: str, missing: str) -> str:
    if not isinstance(item, dict):
        return f"{key}[{index}] is {shown(item)}; it must be an object"
    where = f"{_SINGULAR[key]} {item['id']!r}" if "id" in item else f"{key}[{index}]"
    if "file_name" in item:
        where += f" ({'image ' if key == 'annotations' else ''}{item['file_name']})"
    if missing:
        return f"{where} has no {field!r}; it must be {_MEANING[field]}"
    return f"{where} has the {field} {shown(item[field])}; it must be {_MEANING[field]}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def short(value: Any) -> str:
    """``repr(value)``, of bounded length."""
    return _SHORT.repr(value)


def shown(value: Any) -> str:
    """``value`` with its type in words, so that "1" and 1 differ."""
    if value is None:
        return "null"
    kinds = {bool: "", str: "text", list: "a list", dict: "an object"}
    kind = kinds.get(type(value), "a number")
    return short(value) + (f" ({kind})" if kind else "")


def others(count: int, things: str) -> str:
    """What follows the first of its kind: (and 7 other annotations); "" for none."""
    if not count:
        return ""
    if count == 1:
        return f" (and one other of the {things})"
    return f" (and {count} other {things})"


def whole(value: float | int | str) -> int | str | None:
    """An id or a size with 96.0 as 96; None where it is no whole number."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value
