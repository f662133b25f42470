"""Image files whose names in the annotations are not quite those on disk."""

from __future__ import annotations

import itertools
import logging
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from urllib.parse import unquote, urlsplit

from . import DataError

logger = logging.getLogger(__name__)


def _unescape(name: str) -> str:
    try:
        return unquote(urlsplit(name).path if "://" in name else name)
    except ValueError:  # no URL
        return name


# What is done to a name of the annotations and to one on disk before they are compared; in this
# order, so that more rules find more.
_RULES: dict[str, Callable[[str], str]] = {
    "URL escapes are decoded": _unescape,
    "backslashes are read as slashes": lambda name: name.replace("\\", "/"),
    "accents are composed (NFC)": lambda name: unicodedata.normalize("NFC", name),
    "upper and lower case are the same": str.casefold,
}
_FOLDERS = "folders in front may differ"


def find_files(
    json_file: str,
    image_root: str,
    file_names: list[str],
    *,
    exact: bool,
    key: str = "GUARDS.FILE_NAMES",
) -> list[str]:
    """The names of files as they are on disk, relative to ``image_root``.

    Args:
        json_file: for messages.
        image_root: directory of the images.
        file_names: as the annotations have them; they may lead out of ``image_root``.
        exact: refuse a name without a file. If not, take the one file in or below ``image_root``
            that fits it by the rules of this module, and warn of it.
        key: of the config, which says so.

    Raises:
        DataError: files are absent, and ``exact`` is True, or no other fits, or several do. The
            message says what would find them.
    """
    if not os.path.isdir(image_root):
        raise DataError(f"the image directory {image_root} (for {json_file}) does not exist")
    listings: dict[str, set[str]] = {}
    absent = []
    for name in file_names:
        # One listing per directory: faster than a look at each of 118,000 files.
        directory, base = os.path.split(os.path.join(image_root, name))
        if directory not in listings:
            listings[directory] = _listing(directory)
        if base not in listings[directory]:
            absent.append(name)
    if not absent:
        return file_names
    fitting = _fitting(image_root, set(absent))
    claims = Counter(map(os.path.normpath, set(file_names) - set(absent)))
    claims.update(files[0] for files, _ in fitting.values() if len(files) == 1)
    message = (
        f"{len(absent)} of the {len(file_names)} images listed in {json_file} are not in "
        f"{image_root}, the first: "
    )
    for name in dict.fromkeys(absent):
        files, rules = fitting.get(name, ([], ()))
        if len(files) > 1:
            why = f"several files fit it: {', '.join(map(_shown, files[:3]))}"
        elif files and claims[files[0]] > 1:
            why = f"{_shown(files[0])} fits it, but also another image"
        else:
            continue
        raise DataError(
            f"{message}{_shown(name)}; if {' and '.join(rules)}, {why}; correct the names"
        )
    counts = Counter(fitting[name][1] for name in absent if name in fitting)
    how = ", ".join(f"{count} if {' and '.join(rules)}" for rules, count in counts.items())
    lost = [name for name in absent if name not in fitting]
    if lost:
        raise DataError(
            f"{message}{_shown(lost[0])}" + (f"; others are found: {how}" if how else "")
        )
    first = fitting[absent[0]][0][0]
    message += f"{_shown(absent[0])}; they are found, {how} (the first: {_shown(first)})"
    if exact:
        raise DataError(f"{message}: correct the names, or take these files with {key} False")
    logger.warning(f"{message}, and taken")
    return [fitting[name][0][0] if name in fitting else name for name in file_names]


def _shown(name: str) -> str:
    return name if name and name.isprintable() else repr(name)


def _listing(directory: str) -> set[str]:
    try:
        return set(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no name of a file
        return set()
    except OSError as error:
        raise DataError(f"cannot list the directory {directory}: {error.strerror}") from None


def _fitting(image_root: str, names: set[str]) -> dict[str, tuple[list[str], tuple[str, ...]]]:
    """For each name the files in and below ``image_root`` that fit it, and the rules by which: the
    least daring ones that single out a file, or else the first by which several fit."""
    files = [
        os.path.normpath(os.path.join(os.path.relpath(folder, image_root), name))
        for folder, _, names_in_folder in os.walk(image_root)
        for name in names_in_folder
    ]
    fitting = {}
    effective = [r for r, apply in _RULES.items() if any(n != apply(n) for n in (*names, *files))]
    combinations = [  # from the least to the most daring
        rules + folders
        for folders in ((), (_FOLDERS,))
        for count in range(len(effective) + 1)
        for rules in itertools.combinations(effective, count)
    ]
    # What the most daring ones do not find cannot be found.
    left = {name for name, matches in _matches(names, files, combinations[-1]) if matches}
    for rules in combinations:
        if not left:
            break
        for name, matches in _matches(left, files, rules):
            if len(matches) == 1 or (matches and name not in fitting):
                fitting[name] = (matches, rules)
        left -= {name for name, (matches, _) in fitting.items() if len(matches) == 1}
    return fitting


def _matches(
    names: set[str], files: list[str], rules: tuple[str, ...]
) -> Iterator[tuple[str, list[str]]]:
    """Each name, with the files that fit it by ``rules``."""

    def tails(name: str) -> list[tuple[str, ...]]:
        """The parts of a path, and where folders in front may differ, the shorter tails of it."""
        for rule in rules:
            name = _RULES[rule](name) if rule in _RULES else name
        parts = tuple(name.split("/"))
        return [parts[i:] for i in range(len(parts))][: None if _FOLDERS in rules else 1]

    index = defaultdict(list)
    for file in files:
        for tail in tails(file):
            index[tail].append(file)
    for name in names:
        yield name, next((index[tail] for tail in tails(name) if tail in index), [])
