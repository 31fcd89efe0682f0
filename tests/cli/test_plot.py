"""`python -m lepton plot`: every metric of every run is in the chart, and what is no run is refused."""

import importlib.util
import json

import pytest

from lepton.cli.main import main
from lepton.cli.plot import PANELS, chart, read_runs, running_mean, short_names

pytest.importorskip("matplotlib")


def run_of(folder, losses, **more):
    folder.mkdir(parents=True)
    lines = [{"step": step, "loss": loss, "grad_norm": 1.0} for step, loss in enumerate(losses, 1)]
    lines.append({"step": len(losses), "val_loss": losses[-1], **more})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_each_run_is_a_line_in_each_panel_it_has_figures_for(tmp_path, capsys):
    one = run_of(tmp_path / "one", [3.0, 2.0, 1.0], tokens_per_step=1.5)
    two = run_of(tmp_path / "two", [3.0, 2.5])
    out = tmp_path / "chart.svg"
    assert main(["plot", str(one), str(two / "metrics.jsonl"), "--out", str(out), "--smooth", "1"]) == 0
    assert capsys.readouterr().out == f"2 runs: {out}\n"
    assert out.read_text().startswith("<?xml")
    panels = {axes.get_title(loc="left"): axes for axes in chart(read_runs([str(one), str(two)]), 1).axes}
    assert [*panels] == [PANELS[name] for name in ("loss", "val_loss", "grad_norm", "tokens_per_step")]
    lines = panels[PANELS["loss"]].get_lines()
    assert [line.get_label() for line in lines] == ["one", "two"]
    assert [[*line.get_ydata()] for line in lines] == [[3.0, 2.0, 1.0], [3.0, 2.5]]
    assert [*panels[PANELS["tokens_per_step"]].get_lines()[1].get_ydata()] == []


def test_noise_is_pale_and_its_running_mean_in_full(tmp_path):
    runs = read_runs([str(run_of(tmp_path / "run", [4.0, 2.0, 0.0]))])
    raw, mean = chart(runs, 2).axes[0].get_lines()
    assert [*raw.get_ydata()] == [4.0, 2.0, 0.0]
    assert [*mean.get_ydata()] == [4.0, 3.0, 1.0]
    assert raw.get_alpha() < 1
    assert running_mean([1.0, 2.0, 6.0], 5) == [1.0, 1.5, 3.0]


def test_the_same_runs_give_the_same_svg(tmp_path):
    folder = run_of(tmp_path / "run", [2.0, 1.0])
    texts = []
    for name in ("a.svg", "b.svg"):
        main(["plot", str(folder), "--out", str(tmp_path / name)])
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]


def test_names_are_as_short_as_tells_runs_apart(tmp_path):
    paths = [tmp_path / place / "metrics.jsonl" for place in ("a/x", "b/x", "b/y")]
    assert short_names(paths) == ["a/x", "b/x", "b/y"]
    assert short_names(paths[1:]) == ["x", "y"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no metrics.jsonl there; give the --checkpoint_dir of a run"),
        (["empty"], "holds no records"),
        (["run", "--out", "chart.gif"], "--out chart.gif: give a name that ends in .svg, .png, .pdf"),
        (["run", "--out", "no/chart.svg"], "cannot write no/chart.svg"),
        (["run", "--smooth", "0"], "--smooth 0: must be at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    run_of(tmp_path / "run", [1.0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    assert main(["plot", *words]) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    folder = run_of(tmp_path / "run", [1.0])
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    assert main(["plot", str(folder)]) == 2
    assert "a chart needs matplotlib; get it with" in capsys.readouterr().err
