import json

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from gn_detect.benchmark.report import Report, bars, environment, lines
from gn_detect.benchmark.timing import Spread


def test_files(tmp_path):
    values = {"a": Spread(2.0, 1.0, 4.0), "b": Spread(3.0, 3.0, 3.0)}
    report = Report(
        "step",
        {"device": "cpu", "images": 2},
        {"Title": [{"variant": "a", "time": "2.00"}, {"variant": "b", "time": "3.00"}]},
        [{"variant": "a", "seconds": [1.0, 2.0, 4.0]}],
        lambda figure: bars(figure, {"time": values}),
    )
    paths = report.write(tmp_path, "step-cpu", "python tools/benchmark.py step")
    assert [path.name for path in paths] == ["step-cpu.json", "step-cpu.md", "step-cpu.png"]
    content = json.loads(paths[0].read_text())
    assert content["command"] == "python tools/benchmark.py step"
    assert content["settings"] == {"device": "cpu", "images": 2}
    assert content["results"] == [{"variant": "a", "seconds": [1.0, 2.0, 4.0]}]
    assert content["environment"]["torch"] == torch.__version__
    table = [line.replace(" ", "") for line in paths[1].read_text().splitlines()]
    assert table[0] == "`pythontools/benchmark.pystep`" and "|a|2.00|" in table
    height, width, _ = plt.imread(paths[2]).shape
    assert height > 100 and width > 100


def test_bars_and_whiskers():
    figure = Figure()
    bars(figure, {"time": {"a": Spread(2.0, 1.0, 4.0)}, "memory": {"a": Spread(5.0, 5.0, 5.0)}})
    first, second = figure.axes
    assert [patch.get_width() for patch in first.patches] == [2.0]
    assert [patch.get_width() for patch in second.patches] == [5.0]
    (whisker,) = first.collections[0].get_segments()
    assert whisker[:, 0].tolist() == [1.0, 4.0]
    assert (first.get_xlabel(), second.get_xlabel()) == ("time", "memory")


def test_lines_are_sorted():
    figure = Figure()
    lines(figure, "size", {"time": {"a": [(2.0, 20.0), (1.0, 10.0)]}})
    (line,) = figure.axes[0].lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1.0, 2.0], [10.0, 20.0])


def test_environment_names_machine_and_versions():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = environment("cpu")
    finally:
        torch.set_num_threads(before)
    assert found["device"] and found["threads"] == 3
    assert found["cuda"] == torch.version.cuda and found["cudnn"] is None
