"""Names of image files that are not quite those on disk."""

import unicodedata

import pytest

from gn_detect.data import DataError, paths
from gn_detect.data.paths import find_files

NFC, NFD = (unicodedata.normalize(form, "fenêtre é.png") for form in ("NFC", "NFD"))
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


def refusal(root, *names, exact=True) -> str:
    with pytest.raises(DataError) as error:
        find(root, *names, exact=exact)
    return str(error.value)


def test_names_that_are_on_disk_stay(root, monkeypatch):
    monkeypatch.delattr(paths.os, "walk")
    (root.parent / "0.png").touch()
    names = [*ON_DISK, "a//2.png", "../0.png", "../images/1.png", str(root / "1.png"), "1.png"]
    assert find(root, *names) == find(root, *names, exact=False) == names


SLASH, ESCAPE, FOLD, FOLDERS = (
    "backslashes are read as slashes",
    "URL escapes are decoded",
    "upper and lower case are the same",
    "folders in front may differ",
)


@pytest.mark.parametrize(
    "name, found, rules",
    [
        ("a\\2.png", "a/2.png", [SLASH]),
        ("a/3%20b.JPG", "a/3 b.JPG", [ESCAPE]),
        ("d e.png", "d%20e.png", [ESCAPE]),
        ("a/3 b.jpg", "a/3 b.JPG", [FOLD]),
        (NFC, NFD, ["accents are composed (NFC)"]),
        ("/home/me/1.png", "1.png", [FOLDERS]),
        ("/1.png", "1.png", [FOLDERS]),
        ("none/../1.png", "1.png", [FOLDERS]),
        ("images/a/2.png", "a/2.png", [FOLDERS]),
        ("3 b.JPG", "a/3 b.JPG", [FOLDERS]),
        ("https://host/b/2.png?size=9", "b/2.png", [ESCAPE, FOLDERS]),
        ("C:\\photos\\1.PNG", "1.png", [SLASH, FOLD, FOLDERS]),
        ("B\\2.png", "b/2.png", [SLASH, FOLD]),
        ("x:\\A\\3%20B.jpg", "a/3 b.JPG", [ESCAPE, SLASH, FOLD, FOLDERS]),
    ],
)
def test_the_one_file_that_fits_is_found_with_consent(root, caplog, name, found, rules):
    message = refusal(root, name, "c.PNG")
    assert "1 of the 2 images listed in train.json are not in" in message
    assert f"1 if {' and '.join(rules)} (the first: {found})" in message
    assert "GUARDS.FILE_NAMES False" in message and not caplog.text
    assert find(root, name, "c.PNG", name, exact=False) == [found, "c.PNG", found]
    assert f"2 if {' and '.join(rules)} (the first: {found}), and taken" in caplog.text


@pytest.mark.parametrize("exact", [False, True])
def test_what_does_not_single_out_a_file_is_refused(root, exact):
    for name, rule, files in (
        ("2.png", FOLDERS, ("a/2.png", "b/2.png")),
        ("c.png", FOLD, ("C.png", "c.PNG")),
    ):
        message = refusal(root, "1.png", name, exact=exact)
        assert f"the first: {name}; if {rule}, several files fit it" in message
        assert all(file in message for file in files)
    for names in (("1.PNG", "1.png"), ("x/1.png", "y/1.png")):
        message = refusal(root, *names, exact=exact)
        assert f"the first: {names[0]}; " in message
        assert "1.png fits it, but also another image" in message
    message = refusal(root, "1.png", "none.png", "A/2.png", "none.jpg", exact=exact)
    assert "3 of the 4 images listed in train.json are not in " in message
    assert f"the first: none.png; others are found: 1 if {FOLD}" in message
    assert refusal(root, "none.png", exact=exact).endswith("the first: none.png")


def test_names_of_no_file(root):
    for name in ("", "\0", "http://[a/x.png", "a" * 5000, "1.png/2.png"):
        assert refusal(root, name)


def test_a_directory_that_is_absent_or_closed(root, monkeypatch):
    with pytest.raises(DataError, match="image directory nowhere .* does not exist"):
        find_files("train.json", "nowhere", ["1.png"], exact=False)

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(paths.os, "listdir", denied)
    with pytest.raises(DataError, match=r"cannot list the directory .*images: Permission denied"):
        find(root, "1.png")
