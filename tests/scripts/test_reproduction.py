"""The reproduction's document says what its runs show, and no more."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from eabf_cli.core.demo import demo_model_path
from eabf_cli.core.methods import METHODS
from eabf_cli.core.resolution import resolve_scaling
from eabf_cli.core.scaling_config import RopeScalingConfig

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_DOCUMENTS, NUM_PROMPTS, SPANS_PER_PROMPT = 24, 26, 4


@pytest.fixture(autouse=True)
def _scripts_on_path() -> Iterator[None]:
    sys.path.insert(0, str(REPOSITORY / "scripts" / "reproduction"))
    yield
    sys.path.remove(str(REPOSITORY / "scripts" / "reproduction"))


def result(cell: Any, *, found: float, loss: float, noise_seed: object = 0, num_passkeys: int = 45) -> dict[str, Any]:
    """A run's file: a share of the trials is found, documents scatter around a loss.

    Which trials are found depends on the run's seed and on `noise_seed`, the documents' scatter on the document.
    """
    rng = random.Random(f"{cell.seed}/{noise_seed}")
    values: dict[str, dict[str, list[float]]] = {
        name: {} for name in ("perplexity", "passkey", "needles", "repeated_span", "multi_key")
    }
    clusters: dict[str, dict[str, list[int]]] = {
        name: {} for name in ("passkey", "needles", "repeated_span", "multi_key")
    }
    for length in map(str, cell.lengths):
        values["perplexity"][length] = [
            loss + random.Random(document).gauss(0, 0.4) + rng.gauss(0, 0.002) for document in range(NUM_DOCUMENTS)
        ]
        for task, prompts in (
            ("passkey", list(range(num_passkeys))),
            ("needles", list(range(NUM_PROMPTS)) * 5),
            ("repeated_span", [number // SPANS_PER_PROMPT for number in range(48)]),
            ("multi_key", list(range(60))),
        ):
            clusters[task][length] = prompts
            values[task][length] = [int(rng.random() < found) for _ in prompts]
    return {
        "cell": asdict(cell),
        "scores": {"values": values, "clusters": clusters},
        "effective_length": None,
        "wall_s": 3_600.0,
        "torch": "2.0",
    }


def write(folder: Path, cell: Any, **numbers: Any) -> None:
    (folder / f"{cell.key}.json").write_text(json.dumps(result(cell, **numbers)))


def runs(name: str, found: float, *, loss: float = 3.0, seeds: tuple[int, ...] = (42, 43, 44), **options: Any) -> Any:
    from cells import Cell
    from estimates import Runs, unit_scores

    cells = [Cell(name=name, variant=None, seed=seed) for seed in seeds]
    scores = {
        cell.seed: unit_scores(result(cell, found=found, loss=loss, noise_seed=name, **options)) for cell in cells
    }
    return Runs(name, scores, 3)


# ---- The cells ----------------------------------------------------------------------------------------


def test_cells_of_one_name_on_disk_are_the_same_run() -> None:
    """Experiments share runs by the file's name, so that a name must mean one thing."""
    from cells import EXPERIMENTS

    by_key: dict[str, Any] = {}
    for make in EXPERIMENTS.values():
        for cell in make():
            assert by_key.setdefault(cell.key, cell) == cell
    assert len(by_key) > 100


def test_every_variant_of_a_method_in_the_table_can_be_applied_to_its_model() -> None:
    from cells import EXPERIMENTS

    config = AutoConfig.from_pretrained(demo_model_path())
    variants = {cell.variant for make in EXPERIMENTS.values() for cell in make() if cell.variant is not None}
    known = [variant for variant in variants if variant.method in METHODS]
    for variant in known:
        scaling = RopeScalingConfig(
            method=variant.method,
            factor=variant.factor,
            rope_theta=variant.rope_theta,
            unscaled_layers=variant.unscaled_layers,
        )
        assert resolve_scaling(config, scaling).scaling.max_position_embeddings == 512 * variant.factor
    # The others are the study's own, each of two parts.
    assert all("+" in variant.method for variant in variants - set(known))


# ---- Verdicts -----------------------------------------------------------------------------------------


def test_planted_orderings_are_found_and_a_null_is_left_open() -> None:
    from verdicts import HOLDS, OPEN, REVERSED, Claim, judge

    models = {
        "good": runs("good", 0.95, loss=2.9),
        "twin": runs("twin", 0.95, loss=2.9),
        "bad": runs("bad", 0.2, loss=3.2),
    }
    claims = [
        Claim(better="good", worse="bad", length=2_048),
        Claim(better="bad", worse="good", length=2_048),
        Claim(better="good", worse="twin", length=2_048),
    ]
    for measurement, gap in (("retrieval", 0.75), ("perplexity", 0.3)):
        judged = judge(claims, models, measurement)
        assert [judgement.verdict for judgement in judged] == [HOLDS, REVERSED, OPEN]
        assert judged[0].advantage == pytest.approx(gap, rel=0.2)
        assert judged[1].advantage == pytest.approx(-judged[0].advantage)


def test_what_only_the_trials_show_is_said_of_these_models_alone() -> None:
    """One draw of samples is far better, the others are equal: no claim about further draws."""
    from estimates import Runs
    from verdicts import HOLDS_HERE, Claim, judge

    even, lucky = runs("even", 0.5), runs("lucky", 0.5, seeds=(43, 44))
    mixed = Runs("mixed", {42: runs("lucky", 0.98, seeds=(42,)).scores[42]} | dict(lucky.scores), 3)
    (judged,) = judge([Claim(better="mixed", worse="even", length=2_048)], {"even": even, "mixed": mixed}, "retrieval")
    assert judged.verdict == HOLDS_HERE


def test_a_model_without_runs_is_missing_and_seeds_are_paired() -> None:
    from estimates import Runs, difference
    from verdicts import MISSING, Claim, judge

    good, none = runs("good", 0.9), Runs("none", {}, 3)
    (judged,) = judge([Claim(better="good", worse="none", length=512)], {"good": good, "none": none}, "retrieval")
    assert judged.verdict == MISSING
    one = runs("one", 0.9, seeds=(44,))
    found = difference(good, one, "needles", 512)
    assert found is not None
    assert found.num_seeds == 1
    expected = [
        a - b
        for a, b in zip(good.scores[44].values["needles"][512], one.scores[44].values["needles"][512], strict=True)
    ]
    assert found.mean == pytest.approx(sum(expected) / len(expected))


def test_models_with_more_passkeys_are_compared_on_the_common_ones() -> None:
    from estimates import difference

    few, many = runs("few", 0.5), runs("many", 0.5, num_passkeys=135)
    found = difference(few, many, "passkey", 512)
    assert found is not None
    assert found.trials.num_units == 3 * 45


def test_models_that_were_asked_other_questions_are_not_compared() -> None:
    from estimates import difference

    a, b = runs("a", 0.5), runs("b", 0.5)
    b.scores[42].clusters["needles"][512][-1] += 1
    with pytest.raises(ValueError, match="a and b were asked other questions under seed 42"):
        difference(a, b, "needles", 512)


def test_trials_are_sorted_by_prompt_whatever_the_order_of_wordings() -> None:
    from cells import Cell
    from estimates import unit_scores

    kept = result(Cell(name="a", variant=None, seed=42), found=0.5, loss=3.0)
    scores = unit_scores(kept)
    expected: dict[int, list[float]] = {}
    for cluster, value in zip(
        kept["scores"]["clusters"]["needles"]["512"], kept["scores"]["values"]["needles"]["512"], strict=True
    ):
        expected.setdefault(cluster, []).append(value)
    assert scores.values["needles"][512] == [value for cluster in sorted(expected) for value in expected[cluster]]
    assert len(scores.values["retrieval"][512]) == 5 * NUM_PROMPTS + 12 * SPANS_PER_PROMPT


def test_the_larger_models_positions_are_quarters() -> None:
    from cells import Cell
    from estimates import unit_scores

    kept = result(Cell(name="a", variant=None, seed=42), found=0.5, loss=3.0)
    stretches = [(1, 1_024), *((1_024 * number, 1_024 * (number + 1)) for number in range(1, 16))]
    kept["scores"]["positions"] = {f"{start}-{end}": [end / 1_024, 0.0] for start, end in stretches}
    scores = unit_scores(kept)
    assert scores.values["positions"] == {
        4_096: [2.5, 0.0], 8_192: [6.5, 0.0], 12_288: [10.5, 0.0], 16_384: [14.5, 0.0]
    }  # fmt: skip


def test_the_papers_orderings_leave_out_ties() -> None:
    from published_results import BY_LENGTH
    from verdicts import claims_of

    claims = claims_of(BY_LENGTH, {1: 512, 2: 1_024, 4: 2_048, 8: 4_096})
    assert len(claims) == 39  # 10 pairs at 4 lengths; NTK-by-parts and YaRN are level at two windows
    at_eight = {(claim.better, claim.worse): claim.gap for claim in claims if claim.length == 4_096}
    assert at_eight["eabf", "abf"] == 1.5
    assert at_eight["yarn", "linear"] == 0.2


# ---- Tuning -------------------------------------------------------------------------------------------


def dev_result(losses: tuple[float, float, float], retrieval: float) -> dict[str, Any]:
    """Two documents around each loss, 20 trials."""
    values = {
        "perplexity": {
            str(length): [loss - 0.1, loss + 0.1] for length, loss in zip((512, 1_024, 2_048), losses, strict=True)
        }
        | {"4096": [99.0, 99.0]},
        "multi_key": {"2048": [1] * round(20 * retrieval) + [0] * round(20 * (1 - retrieval))},
    }
    return {"scores": {"values": values}}


def test_the_lowest_loss_is_chosen_unless_it_costs_more_than_five_points_of_retrieval() -> None:
    from choosing import chosen_variant
    from variants import PUBLISHED

    results = {
        "abf": dev_result((3.0, 3.0, 3.3), 0.80),  # mean 3.1
        "abf-learning_rate-0.0001": dev_result((3.0, 3.0, 3.0), 0.70),  # lowest, but 10 points below the best
        "abf-learning_rate-0.001": dev_result((3.1, 3.0, 3.05), 0.75),  # 3.05, exactly 5 points below
        "abf-rope_theta-182000": dev_result((3.2, 3.2, 3.2), 0.85),
        "abf-rope_theta-1e+06": dev_result((3.3, 3.3, 3.3), 0.80),
    }
    variant = chosen_variant("abf", results)
    assert variant is not None
    assert (variant.learning_rate, variant.rope_theta) == (1e-3, PUBLISHED["abf"].rope_theta)
    del results["abf-rope_theta-1e+06"]
    assert chosen_variant("abf", results) is None


def test_tuned_runs_are_planned_once_their_numbers_are_chosen(tmp_path: Path) -> None:
    from cells import tuning
    from choosing import tuned_cells

    for cell in tuning():
        if cell.name == "eabf" or cell.name.startswith("eabf-"):
            write(tmp_path, cell, found=0.9, loss=2.8 if cell.name == "eabf-learning_rate-0.001" else 3.0)
        elif cell.name.startswith("abf"):
            write(tmp_path, cell, found=0.9, loss=2.8 if cell.name == "abf" else 3.0)
    planned = {cell.name: cell.variant for cell in tuned_cells(tmp_path)}
    assert list(planned) == ["abf", "eabf-tuned"]  # the published numbers of abf: its runs are there already
    assert planned["eabf-tuned"].learning_rate == 1e-3


# ---- The document -------------------------------------------------------------------------------------


def test_the_document_tells_what_is_missing(tmp_path: Path) -> None:
    from cells import ablations, extrapolation
    from document import write_document

    write_document(tmp_path, tmp_path / "empty.md", tmp_path / "empty.png")
    assert "| extrapolation | 35 | 0 | 35 |" in (tmp_path / "empty.md").read_text()
    shares = {"original": 0.9, "linear": 0.1, "ntk-by-parts": 0.5, "yarn": 0.6, "abf": 0.8, "eabf": 0.95}
    for cell in extrapolation():
        if cell.seed == 42 or cell.name in ("eabf", "abf"):
            write(tmp_path, cell, found=shares.get(cell.name, 0.95), loss=3.0)
    for cell in ablations():
        if cell.name == "eabf-unbounded":
            write(tmp_path, cell, found=0.2, loss=3.5)
    write_document(tmp_path, tmp_path / "page.md", tmp_path / "page.png")
    text = (tmp_path / "page.md").read_text()
    assert "| extrapolation | 35 | 15 | 20 |" in text
    assert "Still missing: 20 of this section's 35 runs, of `original`, `linear`, `ntk-by-parts`" in text
    assert "1 of 5 seeds" in text
    assert "Inside the original window, `linear` retrieves less than half" in text
    assert "| at 4x, EABF is better than ABF | **holds** |" in text
    assert "`eabf-unbounded` against `eabf` | -7" in text
    assert 0 < (tmp_path / "page.png").stat().st_size < 200_000


def test_a_task_that_the_larger_model_cannot_do_in_its_window_is_said_to_tell_nothing(tmp_path: Path) -> None:
    from cells import larger_model
    from further_sections import larger_model_section

    for cell in larger_model():
        if cell.name == "smollm2-original":
            write(tmp_path, cell, found=0.2, loss=3.0)
    assert "says nothing of the window" in " ".join(larger_model_section(tmp_path).split())
    for cell in larger_model():
        if cell.name == "smollm2-original":
            write(tmp_path, cell, found=0.9, loss=3.0)
    assert "says nothing of the window" not in " ".join(larger_model_section(tmp_path).split())


def test_each_difference_counts_the_seeds_that_both_sides_are_to_have() -> None:
    from estimates import Runs
    from formatting import COMPARED, judgement_text
    from verdicts import Claim, judge

    five = Runs("five", runs("five", 0.9, seeds=(42, 43, 44, 48, 49)).scores, 5)
    three, lacking = runs("three", 0.5), runs("lacking", 0.5, seeds=(42, 43))
    models = {"five": five, "three": three, "lacking": lacking}
    for other, note in (("three", ""), ("lacking", ", 2 seeds")):
        (judged,) = judge([Claim(better="five", worse=other, length=2_048)], models, "retrieval")
        text = judgement_text(judged, COMPARED, is_loss=False)
        assert text.partition(")")[2] == note


def test_main_effects_are_those_that_were_planted(tmp_path: Path) -> None:
    """The scale alone finds 40 points more, restoration alone costs 0.2 nats; frequencies do nothing."""
    from cells import study
    from study_document import study_text
    from variants import factorial

    for name, cell in zip(factorial(), study(), strict=True):
        _, scale, loss = name.split("+")
        found = 0.4 if scale == "none" else 0.8
        write(tmp_path, cell, found=found, loss=3.2 if loss == "restoration" else 3.0, noise_seed=name)
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in study_text(tmp_path).splitlines()}
    inside, beyond, retrieval = rows["`eabf` against `none`"]
    assert "open" in inside
    assert "open" in beyond
    assert 35 < float(retrieval.split()[0]) < 45
    assert "better here" in retrieval
    inside, beyond, retrieval = rows["`restoration` against `plain`"]
    assert float(inside.split()[0]) == pytest.approx(-0.2, abs=0.01)
    assert "worse here" in inside
    assert "worse here" in beyond
    assert "open" in retrieval
    assert all("open" in text for text in rows["`parts` against `abf`"])
    assert "Scale, over 6 combinations" in rows


def test_main_effects_leave_out_what_is_not_there_at_every_level(tmp_path: Path) -> None:
    from cells import study
    from study_document import study_text, write_study
    from variants import factorial

    write_study(tmp_path, tmp_path / "study.md")
    assert not (tmp_path / "study.md").exists()
    for name, cell in zip(factorial(), study(), strict=True):
        if name.startswith("abf+"):
            write(tmp_path, cell, found=0.8, loss=3.0)
    write_study(tmp_path, tmp_path / "study.md")
    text = (tmp_path / "study.md").read_text()
    assert text == study_text(tmp_path)
    assert "Scale, over 2 combinations" in text
    assert "Loss, over 3 combinations" in text
    assert "Frequencies, over" not in text
    assert "Still missing: 16 of this section's 22 runs" in text


def test_the_kept_study_is_that_of_the_kept_results() -> None:
    from study_document import STUDY, study_runs, study_text

    results = REPOSITORY / "docs" / "results" / "reproduction"
    has_runs = any(found.scores for found in study_runs(results).values())
    written = (REPOSITORY / STUDY).read_text(encoding="utf-8") if (REPOSITORY / STUDY).exists() else None
    assert written == (study_text(results) if has_runs else None), "python scripts/reproduction --report"


def test_the_kept_document_is_that_of_the_kept_results() -> None:
    from document import DOCUMENT, document_text

    results = REPOSITORY / "docs" / "results" / "reproduction"
    written = (REPOSITORY / DOCUMENT).read_text(encoding="utf-8")
    assert written == document_text(results), "python scripts/reproduction --report"


def test_tuned_methods_are_judged_in_short_as_at_length() -> None:
    from further_sections import tuned_findings, tuning_section

    results = REPOSITORY / "docs" / "results" / "reproduction"
    _, tables = tuned_findings(results)
    rows = [line.split(" | ") for line in tables.splitlines() if "against" in line]
    assert len(rows) == 8
    section = [line.split(" | ") for line in tuning_section(results).splitlines() if "against" in line]
    # Of the four lengths, the third is the target.
    assert [[names, found.removesuffix(" |")] for names, found in rows] == [
        [row[0], row[3]] for row in section if row[0].startswith("| `eabf-tuned`") and not row[0].endswith("`eabf`")
    ]


def test_candidates_lose_nothing_inside_and_the_best_of_loss_and_of_reach_are_confirmed() -> None:
    from confirming import Outcome, confirmed_names

    def outcome(name: str, inside: float, beyond: float, retrieval: float, reach: float) -> Outcome:
        return Outcome(name=name, inside=inside, beyond=beyond, retrieval=retrieval, reach=reach)

    baseline = outcome("eabf", 3.30, 3.40, 0.80, 0.75)
    costs_inside = outcome("costs inside", 3.31, 3.20, 0.99, 0.99)
    forgets = outcome("forgets", 3.29, 3.25, 0.84, 0.50)
    lowest_loss = outcome("lowest loss", 3.30, 3.35, 0.86, 0.60)
    furthest = outcome("furthest", 3.28, 3.38, 0.90, 0.85)
    outcomes = [baseline, costs_inside, forgets, lowest_loss, furthest]

    assert confirmed_names(outcomes, baseline) == ["lowest loss", "furthest"]
    assert confirmed_names([baseline, furthest], baseline) == ["furthest"]
    assert confirmed_names([costs_inside], baseline) == []


def test_the_confirmation_is_planned_on_fresh_seeds_once_everything_is_chosen(tmp_path: Path) -> None:
    from cells import SEEDS, study, tuning
    from confirming import CONFIRMATION_SEEDS, confirmation_cells
    from running import cell_file
    from variants import factorial

    cells = {cell.key: cell for cell in (*study(), *tuning())}
    for cell in cells.values():
        # The restored variants are the best in both; without a change the published numbers win the tuning.
        is_restored = cell.name.endswith("+restoration")
        is_published = cell.name in ("abf", "eabf", "yarn", "linear", "ntk-by-parts")
        loss = 3.0 if is_restored else 3.15 if cell.name == "eabf" else 3.2 if is_published else 3.4
        made = result(cell, found=1.0, loss=loss, noise_seed=cell.name)
        cell_file(tmp_path, cell).write_text(json.dumps(made))
    planned = confirmation_cells(tmp_path)
    names = {cell.name for cell in planned}
    new = names & set(factorial())
    assert new
    assert all(name.endswith("+restoration") for name in new)
    assert names - new == {"eabf", "abf", "yarn"}
    assert {cell.seed for cell in planned} == set(CONFIRMATION_SEEDS)
    assert not set(CONFIRMATION_SEEDS) & set(SEEDS)
    assert {cell.split for cell in planned} == {"test"}

    cell_file(tmp_path, study()[0]).unlink()
    assert confirmation_cells(tmp_path) == []


@pytest.mark.parametrize(
    ("found", "loss", "verdict", "ends"),
    [
        (0.9, 3.0, "beaten", "wins"),
        (0.6, 2.9, "beaten", "wins"),
        (0.6, 3.0, "not beaten", "not told apart beyond the window"),
        (0.9, 3.1, "not beaten", "loss inside is worse and loss beyond is worse"),
        (0.3, 2.9, "not beaten", "retrieval inside is worse and retrieval beyond is worse"),
    ],
)
def test_a_variant_wins_if_it_is_better_beyond_the_window_and_nowhere_worse(
    found: float, loss: float, verdict: str, ends: str
) -> None:
    from confirming import CONFIRMATION_SEEDS
    from spans import spanned
    from winning import conclusions, duel_rows, duels

    rivals = ["eabf", "abf-tuned", "yarn-tuned"]
    measured = {name: runs(name, 0.6, seeds=CONFIRMATION_SEEDS) for name in rivals}
    measured["new"] = runs("new", found, loss=loss, seeds=CONFIRMATION_SEEDS)
    fought = duels(["new"], rivals, spanned(measured))
    assert {row[-1].strip("*").removesuffix(" here") for row in duel_rows(fought)} == {verdict}
    conclusion, *none_wins = conclusions(fought)
    assert ends in conclusion
    assert bool(none_wins) == (ends != "wins")


def test_a_variant_wins_only_against_all_that_it_has_to_beat() -> None:
    from confirming import CONFIRMATION_SEEDS
    from spans import spanned
    from winning import conclusions, duels

    levels = {"new": 0.7, "eabf": 0.4, "abf-tuned": 0.4, "yarn-tuned": 0.95, "eabf-tuned": 0.95}
    measured = {name: runs(name, found, seeds=CONFIRMATION_SEEDS) for name, found in levels.items()}
    rivals = [name for name in levels if name != "new"]
    conclusion, none_wins = conclusions(duels(["new"], rivals, spanned(measured)))
    assert none_wins.startswith("**No variant wins**")
    assert conclusion.startswith("`new` beats `eabf` and `abf-tuned`, but not `yarn-tuned` (")

    # The tuned EABF is shown, and need not be beaten.
    measured["yarn-tuned"] = runs("yarn-tuned", 0.4, seeds=CONFIRMATION_SEEDS)
    (conclusion,) = conclusions(duels(["new"], rivals, spanned(measured)))
    assert "`new` wins" in conclusion


def test_nothing_wins_while_runs_are_missing() -> None:
    from confirming import CONFIRMATION_SEEDS
    from estimates import Runs
    from spans import spanned
    from winning import conclusions, duels

    rivals = ["eabf", "abf-tuned", "yarn-tuned"]
    measured = {name: runs(name, 0.3, seeds=CONFIRMATION_SEEDS) for name in rivals}
    measured["new"] = runs("new", 0.9, seeds=CONFIRMATION_SEEDS)
    for there in ({}, dict(list(measured["eabf"].scores.items())[:2])):
        (conclusion,) = conclusions(duels(["new"], rivals, spanned(measured | {"eabf": Runs("eabf", there, 3)})))
        assert conclusion == "Of `new` or of what it has to beat, runs are missing."
