"""The wheel: it carries the configs, and an installation without detectron2 says what to do."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from detectron2.config import LazyConfig

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[1]
CONFIG = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
LAZY_CONFIG = (
    min((REPO / "configs").glob("lazy/COCO-*/*.py")).relative_to(REPO / "configs").as_posix()
)


def _python(source, cwd):
    env = {**os.environ, "DETECTRON2_ENV_MODULE": ""}
    return subprocess.run(
        [sys.executable, "-c", source], cwd=cwd, env=env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built offline from a copy, so that no build/ is left in the repository."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("building the wheel needs setuptools: pip install -e '.[test]'")
    source = tmp_path_factory.mktemp("source")
    for name in ("gn_detect", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(REPO / name, source)
    build = _python("from setuptools.build_meta import build_wheel; build_wheel('dist')", source)
    assert build.returncode == 0, build.stdout + build.stderr
    assert "absent from the `packages` configuration" not in build.stderr, build.stderr
    (path,) = (source / "dist").glob("gn_detect-*.whl")
    return path


def test_wheel_holds_every_module_and_config(wheel):
    expected = {
        f"gn_detect/configs/{path.relative_to(REPO / 'configs').as_posix()}": path
        for path in (REPO / "configs").rglob("*")
        if path.suffix in (".yaml", ".py")
    }
    assert {f"gn_detect/configs/{name}" for name in (CONFIG, LAZY_CONFIG)} < set(expected)
    expected |= {
        path.relative_to(REPO).as_posix(): path
        for path in (REPO / "gn_detect").rglob("*")
        if path.suffix in (".py", ".html")
    }
    with zipfile.ZipFile(wheel) as archive:
        info = {name for name in archive.namelist() if ".dist-info/" in name}
        assert set(archive.namelist()) - info == set(expected)
        assert any(name.endswith("licenses/LICENSE") for name in info)
        (metadata,) = (name for name in info if name.endswith("/METADATA"))
        assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
        for name, path in expected.items():
            assert archive.read(name) == path.read_bytes(), name


def test_configs_are_found_in_the_installed_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # The module of the wheel, in this process, which has imported that of the checkout.
    spec = importlib.util.spec_from_file_location("installed", tmp_path / "gn_detect/config.py")
    installed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(installed)
    for name in (CONFIG, LAZY_CONFIG):
        found = Path(installed.get_config_file(name))
        assert found == tmp_path / "gn_detect/configs" / name and found.is_file()
    assert LazyConfig.load(str(found)).train.max_iter > 0  # it imports its neighbours
    with pytest.raises(FileNotFoundError, match=f"_gm_.*{CONFIG}"):
        installed.get_config_file(CONFIG.replace("_gn_", "_gm_"))


def test_import_without_detectron2_says_what_to_do():
    script = "import sys; sys.modules['detectron2'] = None; import gn_detect"
    result = _python(script, REPO)
    assert result.returncode != 0
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError:") and "detectron2" in error and "pip install" in error
