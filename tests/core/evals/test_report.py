"""What Markdown, pictures and the terminal show is what the result says."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from eabf_cli.core.evals.markdown import render_markdown
from eabf_cli.core.evals.plots import intervals_figure, lines_figure, maps_figure, write_plots
from eabf_cli.core.evals.report import result_text, view, write_report
from eabf_cli.core.evals.views import Report, Table
from tests.core.evals.made_up_results import (
    DEPTHS,
    LENGTHS,
    WINDOW,
    made_up_comparison,
    made_up_evaluation,
    made_up_verdict,
)

RESULTS = {"evaluation": made_up_evaluation(), "comparison": made_up_comparison(), "verdict": made_up_verdict()}


def table(report: Report, title: str) -> Table:
    return next(found for found in report.tables if found.title == title)


# ---- What is shown -------------------------------------------------------------------------------------


def test_an_evaluation_shows_losses_and_right_answers() -> None:
    result = RESULTS["evaluation"]
    report = view(result)
    assert report.headlines == ["Effective length: 1,024 tokens."]
    documents = "perplexity 12; loss by context 12; perplexity by position 12 up to 512 tokens, 4 up to 2,048"
    assert dict(report.facts)["Documents"] == dict(view(RESULTS["comparison"]).facts)["Documents"] == documents
    losses = {row[0]: row[1:] for row in table(report, "Losses").rows}
    first = result["perplexity"][0]
    assert losses["256"][0] == f"{first['perplexity']:.2f} ± {first['stderr']:.2f}"
    assert losses["256"][1:] == ["3.000 ± 0.050", "2.000"]
    assert losses["2,048"][0] == "–"
    answers = {(row[0], row[1]): row[2:] for row in table(report, "Retrieval").rows}
    cells = [e["accuracy"] for e in result["grid"] if (e["task"], e["length"]) == ("passkey", 512)]
    right = sum(cells) / len(cells)
    # Wilson's ends are where the share found is 1.96 standard errors of a true share away from that.
    wide = 1.96**2 / 30
    middle, half = (right + wide / 2) / (1 + wide), (wide * right * (1 - right) + wide**2 / 4) ** 0.5 / (1 + wide)
    interval = f"({100 * (middle - half):.0f} to {100 * (middle + half):.0f})"
    assert answers["passkey", "512"] == [f"{100 * right:.0f} % {interval}", "30"]
    assert [found.title for found in report.maps] == ["passkey", "multi key"]


def test_every_retrieval_task_that_was_measured_is_shown_at_each_length() -> None:
    result = made_up_evaluation()
    rows = table(view(result), "Retrieval").rows
    tasks = ["passkey", "needles", "multi key", "variable tracking", "repeated span"]
    assert [row[:2] for row in rows] == [[task, f"{length:,}"] for task in tasks for length in LENGTHS]
    trials = {"passkey": "30", "needles": "20", "multi key": "30"}
    assert all(row[3] == trials.get(row[0], "10") for row in rows)
    for task in ("variable_tracking", "repeated_span"):
        shown = [row[2] for row in rows if row[0] == task.replace("_", " ")]
        percents = [
            [100 * entry[name] for name in ("accuracy", "lower_bound", "upper_bound")] for entry in result[task]
        ]
        assert shown == [f"{mean:.0f} % ({low:.0f} to {high:.0f})" for mean, low, high in percents]
    del result["needles"], result["repeated_span"]
    rows = table(view(result), "Retrieval").rows
    assert list(dict.fromkeys(row[0] for row in rows)) == ["passkey", "multi key", "variable tracking"]


def test_a_comparison_shows_each_contender_at_each_length_and_what_is_proven() -> None:
    result = RESULTS["comparison"]
    report = view(result)
    names = ["original", "linear", "yarn", "eabf"]
    assert [row[0] for row in table(report, "What is compared").rows] == names
    shown = table(report, "Loss by visible context")
    assert list(shown.columns) == ["tokens", "256", "512", "1,024", "2,048"]
    entry = next(
        e for e in result["compare"]["yarn"]["intervals"] if (e["measurement"], e["length"]) == ("context_gain", 1024)
    )
    assert shown.rows[2][3] == f"{entry['mean']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"
    perplexity = next(
        e for e in result["compare"]["yarn"]["intervals"] if (e["measurement"], e["length"]) == ("perplexity", 1024)
    )
    assert table(report, "Perplexity").rows[2][3].startswith(f"{np.exp(perplexity['mean']):.2f} (")
    beyond = table(report, "Against eabf, beyond the original window (1,024, 2,048 tokens)")
    outcomes = {(row[0], row[1]): row[4] for row in beyond.rows}
    for e in result["differences"]:
        if e["span"] == "beyond":
            name = {"context_gain": "loss by visible context"}.get(e["measurement"], e["measurement"])
            assert outcomes[e["model"], name] == e["outcome"].replace("open", "not told apart")
    assert {chart.title for chart in report.lines} == {
        "Perplexity by position",
        "Perplexity by length",
        "Loss by visible context",
        "Passkey by length",
    }
    assert [found.title for found in report.maps] == [f"{name}: passkey" for name in names]
    assert dict(report.facts)["Training"] == "100 samples of demo-long (longer ones: truncate)"
    assert report.headlines == result["summary"]


def test_one_seed_is_said_to_tell_nothing_about_others() -> None:
    assert any("nothing about other samples" in note for note in view(made_up_comparison(seeds=[42])).notes)
    assert not any("other samples" in note for note in view(RESULTS["comparison"]).notes)


def test_a_verdict_shows_its_sentence_and_how_far_each_is_behind() -> None:
    result = RESULTS["verdict"]
    report = view(result)
    assert report.headlines[0] == result["verdict"]["sentence"]
    assert re.search(r"0\.02\d? nats a token worse than the original|about as good", report.headlines[1])
    rows = {row[0]: row for row in report.tables[0].rows}
    for row in result["verdict"]["rows"]:
        shown = rows[row["title"]]
        assert shown[2] == f"{row['nll']:.3f}"
        if "difference" in row:
            assert shown[3].startswith(f"{row['difference']['mean']:.3f} (")
    (chart,) = report.intervals
    assert list(chart.names) == [f"title of {name}" for name in ("last_window", "retrieved", "yarn")]


def test_no_interval_of_a_loss_goes_below_what_a_loss_can_be() -> None:
    result = made_up_evaluation()
    result["perplexity"][0] |= {"perplexity": 1.2, "stderr": 0.5}
    result["perplexity_by_position"][0] |= {"perplexity": 1.2, "stderr": 0.5}
    result["context_gain"][0] |= {"nll": 0.1, "stderr": 0.2}
    by_position, by_length, by_context = view(result).lines
    assert (by_position.series[0].low[0], by_length.series[0].low[0], by_context.series[0].low[0]) == (1.0, 1.0, 0.0)


# ---- Markdown and the terminal -------------------------------------------------------------------------


def markdown_rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith("|-")
    ]


@pytest.mark.parametrize("kind", RESULTS)
def test_markdown_has_every_cell_of_every_table(kind: str) -> None:
    report = view(RESULTS[kind])
    text = render_markdown(report, ["perplexity.png"])
    rows = markdown_rows(text)
    expected = [list(row) for found in report.tables for row in (found.columns, *found.rows)]
    assert [[re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in rows] == expected
    assert "![perplexity.png](perplexity.png)" in text


def test_names_are_text_and_not_markup() -> None:
    hostile = "a|b <img src=x> `code` *bold* [link](x)\nline"
    text = render_markdown(view(made_up_verdict(model=hostile)))
    assert r"a\|b \<img src=x\> \`code\` \*bold\* \[link\](x) line" in text.splitlines()[0]


@pytest.mark.parametrize("kind", ["comparison", "verdict"])
def test_the_terminal_shows_the_sentences_and_the_tables(kind: str) -> None:
    result = RESULTS[kind]
    text = result_text(result)
    for sentence in view(result).headlines:
        assert sentence in text
    for found in view(result).tables:
        for row in found.rows:
            assert any(all(cell in line for cell in row) for line in text.splitlines())


@pytest.mark.parametrize("kind", ["comparison", "verdict"])
def test_the_terminal_says_where_the_result_is(kind: str) -> None:
    assert result_text(RESULTS[kind] | {"output": "measured"}).endswith("Written to measured")
    assert "Written to" not in result_text(RESULTS[kind] | {"output": None})


NEEDS = {"memory": {"total_gib": 1.26}, "available_gib": 20.04, "expected_s": 61.0, "device": "cpu"}


def test_the_plan_of_a_training_says_what_one_run_does() -> None:
    planned = {key: value for key, value in made_up_comparison(seeds=[42]).items() if key != "compare"}
    recipe = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-4}
    training = {"num_samples": 100, "num_steps": 50, "num_tokens": 409_600, "tuning": "full", "recipe": recipe}
    text = result_text(planned | NEEDS | {"training": training})
    assert "finetuned under 1 seed, at" in text
    assert "Each of 5 runs: 100 samples, 409,600 tokens, 50 steps, learning rate 0.0001, full" in text
    needs = "Measuring takes about 1.3 GiB on cpu (20.0 GiB available)"
    assert f"{needs}, roughly 2 min, training comes on top" in text


def test_a_plan_is_told_as_one() -> None:
    planned = {key: value for key, value in made_up_comparison().items() if key not in ("compare", "differences")}
    text = result_text(planned | NEEDS | {"expected_s": None})
    assert "Measuring takes about 1.3 GiB on cpu (20.0 GiB available)\n" in text
    assert "under linear, yarn, eabf, finetuned under 2 seeds, at 256, 512, 1,024, 2,048 tokens" in text
    assert "Nothing was measured" in text
    planned = {key: value for key, value in made_up_verdict().items() if key != "verdict"}
    text = result_text(planned | {"num_stretches": 30, "num_documents": 10})
    assert "a/model (from 512 to 2,048 tokens) against the/original" in text
    assert "30 stretches of 10 documents in my documents" in text


# ---- Pictures ------------------------------------------------------------------------------------------


def test_lines_are_the_numbers_and_the_window_is_marked() -> None:
    report = view(RESULTS["comparison"])
    figure = lines_figure(report.lines)
    assert figure is not None
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [chart.title for chart in report.lines]
    for axes, chart in zip(panels, report.lines, strict=True):
        drawn = [line.get_xydata().tolist() for line in axes.lines]
        for series in chart.series:
            assert [list(pair) for pair in zip(series.x, series.y, strict=True)] in drawn
            for x, low, high in zip(series.x, series.low, series.high, strict=True):
                assert [[x, low], [x, high]] in drawn
        assert any(set(line.get_xdata()) == {WINDOW} and line.get_linestyle() == ":" for line in axes.lines)
        assert axes.get_xscale() == "log"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["original", "linear", "yarn", "eabf"]


def test_maps_are_the_shares() -> None:
    report = view(RESULTS["evaluation"])
    figure = maps_figure(report.maps)
    assert figure is not None
    for axes, found in zip(figure.axes, report.maps, strict=False):
        np.testing.assert_array_equal(axes.images[0].get_array(), np.array(found.cells, dtype=float))
        assert [text.get_text() for text in axes.get_xticklabels()] == [f"{length:,}" for length in LENGTHS]
        assert [text.get_text() for text in axes.get_yticklabels()] == [f"{depth:.0%}" for depth in DEPTHS]
        grid = {
            (e["length"], e["depth"]): e["accuracy"] for e in RESULTS["evaluation"]["grid"] if e["task"] == "passkey"
        }
        if found.title == "passkey":
            assert found.cells[1][2] == grid[1024, 0.5]


def test_intervals_are_the_estimates() -> None:
    report = view(RESULTS["verdict"])
    figure = intervals_figure(report.intervals)
    assert figure is not None
    lines = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    for number, row in enumerate(row for row in RESULTS["verdict"]["verdict"]["rows"] if "difference" in row):
        found = row["difference"]
        assert [[found["low"], number], [found["high"], number]] in lines
        assert [[found["mean"], number]] in lines


def test_nothing_is_drawn_of_nothing() -> None:
    assert lines_figure([]) is maps_figure([]) is intervals_figure([]) is None


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("evaluation", ["needles.png", "perplexity.png"]),
        ("comparison", ["differences.png", "needles.png", "perplexity.png"]),
        ("verdict", ["differences.png"]),
    ],
)
def test_pictures_have_something_in_them(kind: str, files: list[str], tmp_path: Path) -> None:
    write_report(RESULTS[kind], tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == files
    for name in files:
        pixels = matplotlib.image.imread(tmp_path / name)
        colours = (255 * pixels[:, :, :3]).astype(int) @ (1, 256, 256**2)
        assert len(np.unique(colours)) > 50
    text = (tmp_path / "report.md").read_text()
    assert all(f"![{name}]({name})" in text for name in files)


def test_names_may_have_any_letters(tmp_path: Path) -> None:
    result: dict[str, Any] = made_up_comparison()
    result["compare"] = {rf"{name}$\undefined{{$ 模型": entry for name, entry in result["compare"].items()}
    result["reference"] = next(name for name in result["compare"] if name.startswith("eabf"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_plots(view(result), tmp_path)
