"""What docs/ says can be run does what it says."""

import importlib.util
import logging
import re
import shlex

import pytest
from helpers import ROOT, run_tool

from gn_detect.config import ConfigError

GUARDS = re.findall(
    r"^\| `(\w+)`( \(warns\))? \| `(.+?)`(?: after `(.+?)`)? \|",
    (ROOT / "docs/small_batches.md").read_text(),
    flags=re.MULTILINE,
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory in which the commands run; they share the generated data."""
    return tmp_path_factory.mktemp("docs")


@pytest.fixture
def train_net(workplace, monkeypatch):
    """What ``tools/train_net.py`` does before it starts to train, in this process."""
    monkeypatch.chdir(workplace)
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "tools/train_net.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def set_up(options):
        name, *opts = shlex.split(options)
        args = ["train_net.py", "--config-file", str(ROOT / "configs" / name), *opts]
        monkeypatch.setattr("sys.argv", args)
        tool.setup(tool.parse_args())

    return set_up


def test_every_guard_has_a_command():
    assert len(GUARDS) == 11


@pytest.mark.parametrize("switch, warns, options, before", GUARDS, ids=[g[0] for g in GUARDS])
def test_guards(switch, warns, options, before, train_net, workplace, caplog, monkeypatch):
    if warns:
        # The tool has set the logger up for a terminal.
        monkeypatch.setattr(logging.getLogger("gn_detect"), "propagate", True)
        with caplog.at_level(logging.WARNING, "gn_detect"):
            train_net(options)
        assert f"GUARDS.{switch} False" in caplog.text
    elif before:  # weights are looked at when they are loaded
        for command, error in ((f"{before} DATASETS.TEST ()", ""), (options, f"GUARDS.{switch}")):
            name, *opts = shlex.split(command)
            args = ["--config-file", ROOT / "configs" / name, *opts]
            result = run_tool("train_net.py", *args, cwd=workplace, check=not error)
            assert error in result.stderr
        assert result.returncode == 1
    else:
        with pytest.raises(ConfigError, match=f"set GUARDS.{switch} False"):
            train_net(options)
