"""Image files whose names in the annotations are not quite those on disk."""

from __future__ import annotations

import functools
import itertools
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from urllib.parse import unquote

from . import DataError

# What is done to a name of the annotations and to one on disk before they are compared, from the
# least to the most daring.
_RULES: dict[str, Callable[[str], str]] = {
    "URL escapes are decoded": lambda name: unquote(re.sub(r"(?<=://)(.*?)[?#].*", r"\1", name)),
    "backslashes are read as slashes": lambda name: name.replace("\\", "/"),
    "accents are composed (NFC)": lambda name: unicodedata.normalize("NFC", name),
    "upper and lower case are the same": str.casefold,
    "folders in front may differ": os.path.basename,
}


def find_files(
    json_file: str,
    image_root: str,
    file_names: list[str],
    *,
    exact: bool,
    key: str = "GUARDS.FILE_NAMES",
) -> tuple[list[str], list[str]]:
    """The names of files as they are on disk, relative to ``image_root``; and a warning where they
    are others.

    Args:
        file_names: as the annotations have them; they may lead out of ``image_root``.
        exact: refuse a name without a file. If not, take the one file in or below ``image_root``
            that fits it by the rules of this module.
        key: of the config, which says so.

    Raises:
        DataError: files are absent, and ``exact`` is True, or no other fits, or several do. The
            message says what would find them.
    """
    if not os.path.isdir(image_root):
        raise DataError(f"the image directory {image_root} (for {json_file}) does not exist")
    listing = functools.cache(_listing)  # faster than a look at each of 118,000 files
    places = [os.path.split(os.path.join(image_root, name)) for name in file_names]
    absent = [n for n, (d, base) in zip(file_names, places, strict=True) if base not in listing(d)]
    if not absent:
        return file_names, []
    message = (
        f"{len(absent)} of the {len(file_names)} images listed in {json_file} are not in "
        f"{image_root}, the first: "
    )
    index = defaultdict(list)
    for folder, _, files in os.walk(image_root):
        for file in files:
            file = os.path.relpath(os.path.join(folder, file), image_root)
            for tail in _tails(file):
                index[tail].append(file)
    owners = {os.path.normpath(name): name for name in set(file_names).difference(absent)}
    found, counts = {}, Counter()
    for name, count in Counter(absent).items():
        fits = defaultdict(list)
        for file in next((index[tail] for tail in _tails(name) if tail in index), []):
            fits[_needed(name, file)].append(file)
        if not fits:
            continue
        needed, (file, *others) = min(fits.items())
        rules = " and ".join(itertools.compress(_RULES, needed[::-1]))
        owner = owners.setdefault(file, name)
        if others or owner != name:
            names, files = (sorted(map(repr, p)) for p in ({owner, name}, [file, *others]))
            pairs = f"{' and '.join(names)} may be {' or '.join(files[:3])}"
            raise DataError(f"{message}{name!r}; if {rules}, {pairs}; correct the names")
        found[name] = file
        counts[rules] += count
    how = ", ".join(f"{count} if {rules}" for rules, count in counts.items())
    if lost := [name for name in absent if name not in found]:
        raise DataError(f"{message}{lost[0]!r}" + (how and f"; others are found: {how}"))
    message += f"{absent[0]!r}; they are found, {how} (the first: {found[absent[0]]!r})"
    if exact:
        raise DataError(f"{message}: correct the names, or take these files with {key} False")
    return [found.get(name, name) for name in file_names], [f"{message}, and taken"]


def _listing(directory: str) -> set[str]:
    try:
        return set(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no name of a file
        return set()
    except OSError as error:
        raise DataError(f"cannot list the directory {directory}: {error.strerror}") from None


def _apply(rules: Iterable[str], name: str) -> str:
    return functools.reduce(lambda changed, rule: _RULES[rule](changed), rules, name)


def _tails(name: str) -> list[str]:
    """A name by all rules but that of the folders, and the shorter tails of its path."""
    parts = _apply([*_RULES][:-1], name).split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def _needed(name: str, file: str) -> tuple[bool, ...]:
    """Which rules make a name that of a file, from the most to the least daring. Of two results the
    smaller one is less daring."""
    needed = list(_RULES)
    for rule in reversed(_RULES):
        fewer = [r for r in needed if r != rule]
        if _apply(fewer, name) == _apply(fewer, file):
            needed = fewer
    return tuple(rule in needed for rule in reversed(_RULES))
