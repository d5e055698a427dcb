"""The picture shows the numbers of the result."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eabf_cli.core.entropy.panels import panels_of
from eabf_cli.core.entropy.plots import entropy_figure, write_plots
from tests.core.entropy.made_up_result import WINDOW, made_up_result


def panel_axes(figure: Figure) -> list[tuple[Axes, Axes]]:
    """The curves and the map of each row; the colour bars come after them."""
    return [(row.axes[0], row.axes[1]) for row in figure.subfigs]


def layer_curves(axes: Axes, num_positions: int) -> list[np.ndarray]:
    """The y values of the lines by layer, without the bound, the window and the samples of the legend."""
    lines = [line for line in axes.lines if len(line.get_xdata()) == num_positions]
    return [np.asarray(line.get_ydata()) for line in lines if line.get_label() != "ln n, the bound"]


def mean_over_heads(layer: list[list[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*layer, strict=True)]


def test_a_line_for_every_layer_with_its_mean_over_heads() -> None:
    result = made_up_result()
    ((curves, _),) = panel_axes(entropy_figure(result))
    drawn = layer_curves(curves, len(result["positions"]))
    assert len(drawn) == len(result["layers"])
    for line, layer in zip(drawn, result["entropy"], strict=True):
        np.testing.assert_allclose(line, mean_over_heads(layer), rtol=1e-12)
    assert curves.get_xscale() == "log"


def test_bound_and_window_are_marked() -> None:
    result = made_up_result()
    ((curves, _),) = panel_axes(entropy_figure(result))
    by_label = {line.get_label(): line for line in curves.lines}
    np.testing.assert_allclose(by_label["ln n, the bound"].get_ydata(), np.log(result["positions"]))
    assert set(by_label[f"pre-trained window, {WINDOW:,}"].get_xdata()) == {WINDOW}


def test_layers_that_are_not_full_attention_are_dashed_and_named() -> None:
    result = made_up_result()
    ((curves, cells),) = panel_axes(entropy_figure(result))
    num_layers = len(result["layers"])
    solid = [line.get_linestyle() == "-" for line in curves.lines[:num_layers]]
    assert solid == [layer["kind"] == "full" for layer in result["layers"]]
    legend = {text.get_text() for text in curves.get_legend().get_texts()}
    assert {"sliding window layers", "no RoPE layers"} <= legend
    marked = {float(line.get_ydata()[0]) for line in cells.lines}
    assert marked == {layer["index"] for layer in result["layers"] if layer["kind"] != "full"}


def test_map_is_the_slope_by_layer_and_head() -> None:
    result = made_up_result()
    ((_, cells),) = panel_axes(entropy_figure(result))
    np.testing.assert_array_equal(cells.images[0].get_array(), result["head_slope"])
    low, high = cells.images[0].get_clim()
    assert low == -high == -np.abs(result["head_slope"]).max()


def test_comparison_adds_the_other_model_and_the_difference() -> None:
    result = made_up_result(compare=True)
    _, other, difference = panel_axes(entropy_figure(result))
    num_positions = len(result["positions"])
    for axes, key in ((other[0], "entropy"), (difference[0], "difference")):
        drawn = layer_curves(axes, num_positions)
        np.testing.assert_allclose(drawn, [mean_over_heads(layer) for layer in result["compare"][key]], atol=1e-12)
    np.testing.assert_array_equal(other[1].images[0].get_array(), result["compare"]["head_slope"])
    beyond = [n > WINDOW for n in result["positions"]]
    expected = [
        [np.mean([d for d, is_beyond in zip(head, beyond, strict=True) if is_beyond]) for head in layer]
        for layer in result["compare"]["difference"]
    ]
    np.testing.assert_allclose(difference[1].images[0].get_array(), expected)


def test_difference_inside_the_window_alone_is_averaged_over_all_positions() -> None:
    result = made_up_result(compare=True, length=WINDOW)
    difference = panels_of(result)[2]
    np.testing.assert_allclose(difference.cells, np.mean(result["compare"]["difference"], axis=2))
    assert "over all positions" in difference.cells_title


@pytest.mark.parametrize("compare", [False, True])
def test_png_is_a_picture_with_something_in_each_panel(compare: bool, tmp_path: Path) -> None:
    pixels = matplotlib.image.imread(write_plots(made_up_result(compare=compare), tmp_path))
    num_rows = 3 if compare else 1
    height, width, _ = pixels.shape
    assert (width, height) == (1800, 660 * num_rows)
    colours = (255 * pixels[:, :, :3]).astype(int) @ (1, 256, 256**2)
    for row in np.array_split(colours, num_rows, axis=0):
        for half in np.array_split(row, 2, axis=1):
            assert len(np.unique(half)) > 50


def without_slopes(**settings: Any) -> dict[str, Any]:
    """As measured where fewer than two positions lie in the slope's range."""
    result = made_up_result(**settings)
    for part in (result, *([result["compare"]] if "compare" in result else [])):
        part["head_slope"] = [[None for _ in heads] for heads in part["head_slope"]]
    for layer in result["layers"]:
        layer |= {"slope": None, "slope_stderr": None, "rises": False}
    return result | {"slope_range": [2, 2]}


def test_unknown_slopes_are_said(tmp_path: Path) -> None:
    result = without_slopes(compare=True)
    ((_, cells), (_, other), _) = panel_axes(entropy_figure(result))
    for axes in (cells, other):
        assert not axes.images
        assert [text.get_text() for text in axes.texts] == ["too few positions to tell"]
    assert write_plots(result, tmp_path).stat().st_size > 10_000


def test_a_single_position_is_a_visible_point() -> None:
    result = without_slopes()
    for key in ("entropy", "stderr"):
        result[key] = [[curve[-1:] for curve in heads] for heads in result[key]]
    result |= {"positions": [8_192], "visible_keys": [row[-1:] for row in result["visible_keys"]]}
    ((curves, _),) = panel_axes(entropy_figure(result))
    assert all(line.get_marker() == "o" for line in curves.lines[: len(result["layers"])])


def test_a_name_is_text_not_markup_and_may_have_any_letters(tmp_path: Path) -> None:
    name = r"a$\undefined{$ 模型"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_plots(made_up_result(model=name), tmp_path)
    (row,) = entropy_figure(made_up_result(model=name)).subfigs
    assert name in row.get_suptitle()


def test_long_names_are_cut_at_their_start() -> None:
    (row,) = entropy_figure(made_up_result(model=f"{'folder/' * 30}end")).subfigs
    assert len(row.get_suptitle()) == 70
    assert row.get_suptitle().endswith("/end (eabf)")
