"""The wheel: it carries the configs, and an installation without detectron2 says what to do."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
CONFIG = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
LAZY_CONFIG = "lazy/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_gn_9x.py"


def _python(source, cwd, **env):
    inherited = {k: v for k, v in os.environ.items() if k != "DETECTRON2_ENV_MODULE"}
    return subprocess.run(
        [sys.executable, "-c", source],
        cwd=cwd,
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=300,
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
    for name in ("pyproject.toml", "setup.py"):
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
        path.relative_to(REPO).as_posix(): path for path in (REPO / "gn_detect").rglob("*.py")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == set(expected)
        for name, path in expected.items():
            assert archive.read(name) == path.read_bytes(), name


def test_configs_are_found_in_the_installed_wheel(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = f"""
import gn_detect
print(gn_detect.__file__)
print(gn_detect.get_config_file({CONFIG!r}))
from detectron2.config import LazyConfig
lazy_config = gn_detect.get_config_file({LAZY_CONFIG!r})
print(lazy_config, LazyConfig.load(lazy_config).train.max_iter)  # it imports its neighbours
try:
    gn_detect.get_config_file({CONFIG.replace("_gn_", "_gm_")!r})
except FileNotFoundError as error:
    print(error)
"""
    result = _python(script, tmp_path, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    package, found, lazy, error = result.stdout.splitlines()[-4:]
    assert Path(package).is_relative_to(site)
    assert Path(found) == site / "gn_detect" / "configs" / CONFIG and Path(found).is_file()
    assert lazy == f"{site / 'gn_detect' / 'configs' / LAZY_CONFIG} 810000"
    assert "mask_rcnn_R_50_FPN_gm_3x" in error and CONFIG in error


def test_import_without_detectron2_says_what_to_do():
    script = "import sys; sys.modules['detectron2'] = None; import gn_detect"
    result = _python(script, REPO)
    assert result.returncode != 0
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError:") and "detectron2" in error and "pip install" in error
