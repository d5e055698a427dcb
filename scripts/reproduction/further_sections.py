"""What the paper lacks: every method tuned with the same budget, ablations, and a larger model."""

from __future__ import annotations

from pathlib import Path

from cells import TARGET_WINDOW, TWICE_TARGET, ablations, extrapolation, larger_model, tuning
from choosing import RULE, candidates, choose, chosen_variant, tuned_cells, tuning_results
from estimates import LOSS, POSITIONS, RETRIEVAL, Runs, level, read_runs
from formatting import listed, paragraph, table
from shared_tables import comparison_table, comparison_tables, level_table, missing_note
from variants import PUBLISHED, TUNED, Variant

# A share that a model must find inside its window before a task says something of longer ones.
_CAN_DO = 0.5


def tuning_section(folder: Path) -> str:
    """What each method was tuned to on the dev split, and what that brings on the test split."""
    parts = [
        "## Published and tuned",
        paragraph(
            f"""Every method gets the same four runs beside its published one on the dev split, with one draw of
            samples, to tune its learning rate and its own number (base or factor). {RULE} The combination was not run
            on the dev split. Nothing is chosen by {TWICE_TARGET[-1]:,} tokens, twice the target: what is tuned may
            lose there what it was not asked to keep, and numbers chosen for that length could be better."""
        ),
        missing_note(tuning(), folder),
        _tuning_table(folder),
        *_tuned_results(folder),
    ]
    return "\n\n".join(part for part in parts if part)


def tuned_findings(folder: Path) -> list[str]:
    """EABF against the others, all tuned, at the target window; empty while a choice or its runs are missing."""
    names = _tuned_names(folder)
    if "eabf" not in names:
        return []
    runs = read_runs(extrapolation(), folder) | read_runs(tuned_cells(folder), folder)
    pairs = [(names["eabf"], other) for method, other in names.items() if method != "eabf"]
    if not any(all(runs[name].scores for name in pair) for pair in pairs):
        return []
    return [
        paragraph(
            """Tuned on the dev split with the same budget ([all lengths](#published-and-tuned)), by how much EABF is
            better at four windows, in points of retrieval and in nats:"""
        ),
        comparison_tables(runs, pairs, TWICE_TARGET, shown=(TARGET_WINDOW,)),
    ]


def ablation_section(folder: Path) -> str:
    """The exempt layers and the lower bound."""
    runs = read_runs(ablations(), folder)
    parts = [
        "## Ablations",
        paragraph(
            """The paper has neither of them. Of the six layers, `eabf` exempts 0 and 1; `eabf-released` none;
            `eabf-first-exempt` layer 0; `eabf-last-two-exempt` 4 and 5; `eabf-last-two-alone` all but 4 and 5.
            `eabf-unbounded` exempts 0 and 1 and has t(i) = ln i / ln c without the lower bound of 1, so that it is
            below 1 inside the original window."""
        ),
        missing_note(ablations(), folder),
    ]
    if any(found.scores for found in runs.values()):
        parts += [
            *(level_table(runs, measurement, TWICE_TARGET) for measurement in (RETRIEVAL, LOSS)),
            paragraph("By how much each is better than `eabf`, in points of retrieval and in nats:"),
            comparison_tables(runs, [(name, "eabf") for name in runs if name != "eabf"], TWICE_TARGET),
        ]
    return "\n\n".join(part for part in parts if part)


def larger_model_section(folder: Path) -> str:
    """SmolLM2-135M-Instruct at twice its window, untrained."""
    cells = larger_model()
    runs = {name.removeprefix("smollm2-"): found for name, found in read_runs(cells, folder).items()}
    target = max(cells[0].lengths)
    parts = [
        "## A larger model without training",
        paragraph(
            f"""SmolLM2-135M-Instruct at {target:,} tokens, twice its window, under every method of the table, without
            training: perplexity by quarters of the positions (each named by its end), and one key of several at ten
            depths. The seeds draw the stretches of text and the prompts. As nothing is trained, a verdict over the
            trials alone ("here") leaves nothing out."""
        ),
        missing_note(cells, folder),
    ]
    if any(found.scores for found in runs.values()):
        ends = tuple(target * quarter // 4 for quarter in (1, 2, 3, 4))
        pairs = [("eabf", name) for name in runs if name != "eabf"]
        parts += [
            level_table(runs, POSITIONS, ends),
            level_table(runs, "multi_key", cells[0].lengths),
            _weak_task_note(runs["original"], min(cells[0].lengths)),
            paragraph("By how much `eabf` is better than the others, in nats and in points:"),
            comparison_table(runs, pairs, POSITIONS, ends, "On loss"),
            comparison_table(runs, pairs, "multi_key", cells[0].lengths, "On one key of several"),
        ]
    return "\n\n".join(part for part in parts if part)


def _weak_task_note(original: Runs, window: int) -> str:
    """That the larger model's keys tell nothing, where it finds few of them inside its own window."""
    inside = level(original, "multi_key", window)
    if inside is None or inside.mean >= _CAN_DO:
        return ""
    return paragraph(
        f"""Inside its own window of {window:,} tokens the model as it stands finds {100 * inside.mean:.0f} % of the
        keys. A task that fails inside the window says nothing of the window: this table orders no methods, and the
        few texts behind it leave its intervals wide. The perplexities are what can be read here."""
    )


def _tuning_table(folder: Path) -> str:
    results = tuning_results(folder)
    rows = []
    for method, field in ((method, field) for method, fields in TUNED.items() for field in fields):
        found = candidates(method, field, results) or []
        chosen = choose(found) if found else None
        rows += [
            (
                f"`{method}`",
                field.replace("_", " "),
                _number(candidate.value),
                f"{candidate.loss:.4f}",
                f"{100 * candidate.retrieval:.1f}",
                "chosen" if candidate is chosen else "",
            )
            for candidate in found
        ]
    if not rows:
        return ""
    return table(("Method", "number", "value", "dev loss (nats)", "dev retrieval (%)", ""), rows)


def _tuned_results(folder: Path) -> list[str]:
    """What was chosen, and the chosen variants on the test split."""
    chosen = _chosen(folder)
    if not chosen:
        return []
    names = {method: name for method, name in _tuned_names(folder).items() if name != method}
    choices = [
        f"- `{names[method]}`: {_changes(method, variant)}" if method in names else f"- `{method}`: as published"
        for method, variant in chosen.items()
    ]
    runs = read_runs(extrapolation(), folder) | read_runs(tuned_cells(folder), folder)
    shown = {name: runs[name] for method in chosen for name in dict.fromkeys((method, names.get(method, method)))}
    parts = [
        "Chosen:",
        "\n".join(choices),
        missing_note(tuned_cells(folder), folder),
        *(level_table(shown, measurement, TWICE_TARGET) for measurement in (RETRIEVAL, LOSS)),
        paragraph("By how much tuning makes each method better, in points of retrieval and in nats:"),
        comparison_tables(runs, [(name, method) for method, name in names.items()], TWICE_TARGET),
    ]
    if "eabf" in chosen:
        eabf = names.get("eabf", "eabf")
        others = [names.get(method, method) for method in chosen if method != "eabf"]
        parts += [
            paragraph("By how much EABF tuned is better than the others tuned:"),
            comparison_tables(runs, [(eabf, other) for other in others], TWICE_TARGET),
        ]
    return parts


def _chosen(folder: Path) -> dict[str, Variant]:
    """What each method was tuned to, where that is known."""
    results = tuning_results(folder)
    return {method: variant for method in TUNED if (variant := chosen_variant(method, results)) is not None}


def _tuned_names(folder: Path) -> dict[str, str]:
    """What a tuned method's runs are called; by its own name where the published numbers were chosen."""
    return {
        method: method if variant == PUBLISHED[method] else f"{method}-tuned"
        for method, variant in _chosen(folder).items()
    }


def _changes(method: str, variant: Variant) -> str:
    """What differs from the published variant."""
    return listed(
        [
            f"{field.replace('_', ' ')} {_number(getattr(variant, field))}"
            for field in TUNED[method]
            if getattr(variant, field) != getattr(PUBLISHED[method], field)
        ]
    )


def _number(value: float | None) -> str:
    if value is None:
        return "published"
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
