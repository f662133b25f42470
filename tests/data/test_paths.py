"""Names of image files that are not quite those on disk."""

import re
import unicodedata
from unittest.mock import Mock

import pytest

from gn_detect.data import DataError, paths
from gn_detect.data.paths import find_files

NFC, NFD = (unicodedata.normalize(form, "fenêtre é.png") for form in ("NFC", "NFD"))
NO_FILE = ["none", "", "\0", "http://[a/x", "a" * 5000, "1.png/2"]
ON_DISK = ["1.png", "a/2.png", "b/2.png", "a/3 b.JPG", "C.png", "c.PNG", "d%20e.png", NFD]


@pytest.fixture
def root(tmp_path):
    for name in ON_DISK:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "images"


def find(root, *names, exact=True):
    return find_files("train.json", str(root), list(names), exact=exact)


def test_names_that_are_on_disk_stay(root, monkeypatch):
    monkeypatch.delattr(paths.os, "walk")
    (root.parent / "0.png").touch()
    names = [*ON_DISK, "a//2.png", "../0.png", "../images/1.png", str(root / "1.png"), "1.png"]
    assert find(root, *names) == find(root, *names, exact=False) == (names, [])


ESCAPE, SLASH, ACCENTS, FOLD, FOLDERS = paths._RULES


@pytest.mark.parametrize(
    "name, found, rules",
    [
        ("a\\2.png", "a/2.png", [SLASH]),
        ("a/3%20b.JPG", "a/3 b.JPG", [ESCAPE]),
        ("d e.png", "d%20e.png", [ESCAPE]),
        ("a/3 b.jpg", "a/3 b.JPG", [FOLD]),
        (NFC, NFD, [ACCENTS]),
        ("/home/me/1.png", "1.png", [FOLDERS]),
        ("x/C.png", "C.png", [FOLDERS]),  # rather than c.PNG
        ("images/a/2.png", "a/2.png", [FOLDERS]),
        ("https://host/b/2.png?size=9", "b/2.png", [ESCAPE, FOLDERS]),
        ("C:\\photos\\1.PNG", "1.png", [SLASH, FOLD, FOLDERS]),
        ("x:\\A\\3%20B.jpg", "a/3 b.JPG", [ESCAPE, SLASH, FOLD, FOLDERS]),
    ],
)
def test_the_one_file_that_fits_is_found_with_consent(root, name, found, rules):
    how = f"if {' and '.join(rules)} (the first: {found!r})"
    with pytest.raises(DataError, match=re.escape(f"1 {how}: ") + ".*GUARDS.FILE_NAMES False"):
        find(root, name, "c.PNG")
    names, (warning,) = find(root, name, "c.PNG", name, exact=False)
    assert names == [found, "c.PNG", found]
    assert f"2 {how}, and taken" in warning


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "names, why",
    [
        (["2.png"], f"the first: '2.png'; if {FOLDERS}, '2.png' may be 'a/2.png' or 'b/2.png'; "),
        (["c.png"], f"the first: 'c.png'; if {FOLD}, 'c.png' may be 'C.png' or 'c.PNG'; "),
        (["1.PNG"], f"the first: '1.PNG'; if {FOLD}, '1.PNG' and '1.png' may be '1.png'; "),
        (["x/1.jpg", "x/3 b.JPG", "y/3 b.JPG"], "'x/3 b.JPG' and 'y/3 b.JPG' may be 'a/3 b.JPG'; "),
        (["none.png", "A/2.png"], f"the first: 'none.png'; others are found: 1 if {FOLD}"),
        *(([name], f"the first: {name!r}") for name in NO_FILE),
    ],
)
def test_what_does_not_single_out_a_file_is_refused(root, exact, names, why):
    count = f"{len(names)} of the {len(names) + 1} images listed in train.json are not in {root}, "
    with pytest.raises(DataError, match=re.escape(count) + ".*" + re.escape(why)):
        find(root, "1.png", *names, exact=exact)


def test_a_directory_that_is_absent_or_closed(root, monkeypatch):
    with pytest.raises(DataError, match="image directory nowhere .* does not exist"):
        find_files("train.json", "nowhere", ["1.png"], exact=False)
    monkeypatch.setattr(paths.os, "listdir", Mock(side_effect=PermissionError(13, "denied")))
    with pytest.raises(DataError, match=r"cannot list the directory .*images: denied"):
        find(root, "1.png")
