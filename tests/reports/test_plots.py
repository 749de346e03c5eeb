"""Plots write pictures of what the plan and the error curves say."""

import builtins

import pytest
import torch
from closeness import FEW32
from torch import nn

import lowrank
from lowrank import LowRankError

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="plots need matplotlib")


@pytest.mark.usefixtures("matplotlib")
def test_ranks_are_written_as_a_png(mlp, tmp_path):
    plan = lowrank.plan(mlp, keep=0.5)
    figure = lowrank.plot_ranks(plan, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(PNG)
    (axes,) = figure.axes
    assert [round(bar.get_width(), 6) for bar in axes.patches] == [
        round(100 * layer.kept_fraction, 6) for layer in plan
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2"]
    written = {text.get_text() for text in axes.texts}
    assert written == {"dense" if layer.rank is None else str(layer.rank) for layer in plan}


@pytest.mark.usefixtures("matplotlib")
def test_spectra_are_curves_from_one_to_zero_with_the_plans_ranks_marked(mlp, tmp_path):
    plan = lowrank.plan(mlp, rank=8)
    figure = lowrank.plot_error_curves(lowrank.error_curves(mlp), plan, tmp_path / "error curves.png")
    assert (tmp_path / "error curves.png").read_bytes().startswith(PNG)
    curves = [line for line in figure.axes[0].lines if len(line.get_ydata()) > 1]
    marks = [line for line in figure.axes[0].lines if len(line.get_ydata()) == 1]
    assert len(curves) == len(marks) == 2
    for curve, mark, layer in zip(curves, marks, plan, strict=True):
        weight = mlp.get_submodule(layer.name).weight.detach().double()
        values = torch.linalg.svdvals(weight)
        expected = [float(values[k:].norm() / values.norm()) for k in range(len(values))] + [0.0]
        assert list(curve.get_ydata()) == pytest.approx(expected, abs=FEW32)
        assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (8, pytest.approx(layer.relative_error))


@pytest.mark.usefixtures("matplotlib")
def test_nothing_is_written_without_a_path(mlp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lowrank.plot_ranks(lowrank.plan(mlp, rank=8))
    lowrank.plot_error_curves(lowrank.error_curves(mlp))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("matplotlib")
def test_a_weight_of_zeros_can_be_drawn():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    nn.init.zeros_(model[0].weight)
    figure = lowrank.plot_error_curves(lowrank.error_curves(model), lowrank.plan(model, rank=8))
    assert max(figure.axes[0].lines[0].get_ydata()) == 0


@pytest.mark.usefixtures("matplotlib")
def test_no_global_figure_stays_open(mlp):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    lowrank.plot_ranks(lowrank.plan(mlp, rank=8))
    assert pyplot.get_fignums() == before


def test_without_matplotlib_the_error_says_what_to_install(mlp, monkeypatch):
    real = builtins.__import__

    def refusing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    plan = lowrank.plan(mlp, rank=8)
    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(LowRankError, match=r"pip install 'torch-lowrank\[plot\]'"):
        lowrank.plot_ranks(plan)
