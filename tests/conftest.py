"""Fixtures of all tests."""

import os

import pytest
import torch

# Generated data goes into the working directory of a test, not to the user's datasets.
os.environ.pop("DETECTRON2_DATASETS", None)

from helpers import SHARED_DATA, CocoFiles

from gn_detect.engine import prepare

# The workers of pytest-xdist share the cores; and maps are so small that threads would wait.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """What is kept from one run to the next goes not to the user's directory, either."""
    os.environ["FVCORE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def resolved_memory(monkeypatch):
    """To look whether a step fits takes longer than the tests' steps: tests/engine/test_memory.py
    does."""
    monkeypatch.setattr(prepare, "resolve_memory", lambda *_: None)


@pytest.fixture
def shared_data():
    if not SHARED_DATA.is_dir():
        pytest.skip("the directory shared/data of real photos is absent")
    return SHARED_DATA


@pytest.fixture
def coco_files(tmp_path):
    """A COCO JSON of three images on disk; a test changes its ``content`` and calls ``write``."""
    return CocoFiles(tmp_path / "data")
