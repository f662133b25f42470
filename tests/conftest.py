"""Fixtures of all tests."""

import os

import pytest
import torch

# Generated data goes into the working directory of a test, not to the user's datasets.
os.environ.pop("DETECTRON2_DATASETS", None)

from helpers import SHARED_DATA, CocoFiles

from gn_detect.engine import memory
from gn_detect.engine.step_memory import StepMemory

# The workers of pytest-xdist share the cores; and maps are so small that threads would wait.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """What is kept from one run to the next goes not to the user's directory, either."""
    os.environ["FVCORE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def estimate(monkeypatch):
    """Of no bytes: a true one, in tests/engine/test_memory.py, takes longer than a step of the
    tests."""
    monkeypatch.setattr(memory, "estimate_step", lambda *_: StepMemory(0, 0, 0, 0, 0))


@pytest.fixture
def shared_data():
    if not SHARED_DATA.is_dir():
        pytest.skip("the directory shared/data of real photos is absent")
    return SHARED_DATA


@pytest.fixture
def coco_files(tmp_path):
    """A COCO JSON of three images on disk; a test changes its ``content`` and calls ``write``."""
    return CocoFiles(tmp_path / "data")
