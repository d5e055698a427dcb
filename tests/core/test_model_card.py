"""The model card: what it carries over, what it claims, and that its commands work."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from eabf_cli.core.card.base_card import BaseCard, read_base_card
from eabf_cli.core.card.runtimes import ALL, RUNTIMES, checkpoint_form
from eabf_cli.core.errors import CheckpointError
from eabf_cli.core.method_request import MethodRequest
from eabf_cli.core.model_card import write_model_card
from eabf_cli.core.patch_checkpoint import PatchConfig, patch_checkpoint, plan_checkpoint
from eabf_cli.core.report import PatchReport

RUN = json.loads((Path(__file__).parents[2] / "docs/results/demo-finetune.json").read_text())
BASE = "Owner/Base-7B"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def patched(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """method -> (a patched folder, the report of what was done)."""
    root = tmp_path_factory.mktemp("cards")
    made: dict[str, tuple[Path, PatchReport]] = {}

    def patch(method: str) -> tuple[Path, PatchReport]:
        if method not in made:
            config = PatchConfig(
                model=str(tiny_llama_folder), output=root / method, request=MethodRequest(method=method)
            )
            patch_checkpoint(config)
            made[method] = root / method, plan_checkpoint(config).report
        return made[method]

    return patch


def card_of(folder: Path, report: PatchReport, **arguments: Any) -> ModelCard:
    write_model_card(folder, report, **({"base_model": BASE, "revision": COMMIT} | arguments))
    return ModelCard.load(folder / "README.md")


def rows_of(card: ModelCard, first: str) -> dict[str, list[str]]:
    """The table whose header begins with `first`: first cell of a row -> the others; the header is under ""."""
    lines = card.text.splitlines()
    (start,) = (index for index, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[0] if rows else ""] = cells[1:]
    return rows


def test_a_patched_checkpoint_carries_licence_and_language_of_its_base(tmp_path: Path) -> None:
    patch_checkpoint(PatchConfig(output=tmp_path / "out"))
    data = ModelCard.load(tmp_path / "out/README.md").data
    assert (data.license, data.language) == ("apache-2.0", "en")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.base_model is None  # the demo model is not on the Hub
    assert {"long-context", "eabf"} <= set(data.tags)


def test_a_base_of_the_hub_is_named_with_its_commit(patched: Any) -> None:
    base_card = BaseCard(
        licence="other", licence_name="base-licence", licence_link="https://example.org/licence", language=("en", "de")
    )
    card = card_of(*patched("eabf"), base_card=base_card)
    assert (card.data.base_model, card.data.base_model_relation) == (BASE, "finetune")
    assert (card.data.license, card.data.license_name) == ("other", "base-licence")
    assert card.data.license_link == "https://example.org/licence"
    assert card.data.language == ["en", "de"]
    assert f"`{BASE}@{COMMIT}`" in card.text


def test_no_path_of_this_machine_is_in_the_card(patched: Any, tmp_path: Path) -> None:
    run = RUN | {"dataset": str(tmp_path / "secret/data.jsonl")}
    card = card_of(*patched("eabf"), base_model=str(tmp_path / "secret/base"), revision=None, run=run)
    assert str(tmp_path) not in str(card)
    assert "`base`" in card.text
    assert "`data.jsonl`" in card.text
    assert card.data.base_model is None
    assert card.data.datasets is None


def test_method_and_its_numbers(patched: Any) -> None:
    folder, report = patched("eabf")
    card = card_of(folder, report)
    assert rows_of(card, "") == {
        "": ["before", "after"],
        "---": ["---", "---"],
        "window (tokens)": ["64", "256"],
        "rope_theta": ["10,000", f"{report.rope_theta:,.0f}"],
    }
    assert "max(1, ln i / ln c)" in card.text
    assert "in 1 layers: 1 at 1" in card.text
    assert "1.333 at 256" in card.text  # ln 256 / ln 64 = 8/6
    assert "Unscaled layers: 0, 1 (exempt)." in card.text


@pytest.mark.parametrize("method", ["abf", "yarn"])
def test_a_method_without_a_scale_by_position_says_so(method: str, patched: Any) -> None:
    card = card_of(*patched(method))
    said = {"abf": "are not scaled by position", "yarn": "carry one factor at every position, 1.296,"}
    assert f"Attention logits {said[method]}" in card.text  # (0.1 ln 4 + 1)^2


def test_nothing_is_claimed_of_a_checkpoint_that_was_not_measured(patched: Any) -> None:
    card = card_of(*patched("eabf"))
    assert "No evaluation was run on this checkpoint." in card.text
    assert card.data.eval_results is None
    unmeasured = card_of(*patched("eabf"), run=RUN | {"original": None, "before": None, "after": None, "control": None})
    assert "Finetuned on 100 samples of `demo-long`" in unmeasured.text
    assert "No evaluation was run on this checkpoint." in unmeasured.text
    assert unmeasured.data.eval_results is None


def test_a_record_that_is_no_finetune_s_tells_nothing(patched: Any) -> None:
    folder, report = patched("eabf")
    patch_record = json.loads((folder / "eabf_run.json").read_text())
    assert "No evaluation was run on this checkpoint." in card_of(folder, report, run=patch_record).text


@pytest.mark.parametrize(
    "damage",
    [
        {"num_tokens": "many"},
        {"after": [1]},
        {"after": {"lengths": [512], "perplexity": [{"length": 512}]}},
        {"after": {"lengths": [512], "passkey": [{"length": 512, "accuracy": None, "num_trials": 1}]}},
        {"after": {"lengths": [512], "passkey": [{"length": 512, "accuracy": 1.0, "num_trials": 0}]}},
    ],
)
def test_a_damaged_record_is_named(damage: dict[str, Any], patched: Any) -> None:
    with pytest.raises(CheckpointError, match=r"eabf_run\.json cannot be read"):
        card_of(*patched("eabf"), run=RUN | damage)


def test_a_run_s_measurements_are_tables(patched: Any) -> None:
    card = card_of(*patched("eabf"), run=RUN)
    perplexity = rows_of(card, "perplexity")
    assert perplexity.pop("") == ["512", "1,024", "2,048", "4,096"]
    perplexity.pop("---")
    assert perplexity == {
        shown: [f"{entry['perplexity']:.2f}" for entry in RUN[name]["perplexity"]]
        for shown, name in (
            ("original", "original"),
            ("patched", "before"),
            ("finetuned", "after"),
            ("control", "control"),
        )
    }
    assert rows_of(card, "passkey")["original"] == ["100%", "0%", "0%", "0%"]
    assert "*Control* is" in card.text
    assert "*Control* is" not in card_of(*patched("eabf"), run=RUN | {"control": None}).text


def test_the_finetuned_model_s_figures_are_the_model_index(patched: Any) -> None:
    results = {result.metric_name: result for result in card_of(*patched("eabf"), run=RUN).data.eval_results}
    after = RUN["after"]
    for entry in after["perplexity"]:
        result = results.pop(f"perplexity at {entry['length']:,} tokens")
        assert (result.metric_type, result.metric_value) == ("perplexity", pytest.approx(entry["perplexity"], abs=1e-4))
    for title, key in (("passkey", "passkey"), ("unseen needles", "needles"), ("repeated span", "repeated_span")):
        for length in after["lengths"]:
            result = results.pop(f"{title} at {length:,} tokens")
            asked = [entry for entry in after[key] if entry["length"] == length]
            num_right = sum(entry["accuracy"] * entry["num_trials"] for entry in asked)
            expected = num_right / sum(entry["num_trials"] for entry in asked)
            assert (result.metric_type, result.metric_value) == ("accuracy", pytest.approx(expected, abs=1e-4))
    assert not results


def test_a_dataset_of_the_hub_is_named(patched: Any) -> None:
    assert card_of(*patched("eabf"), run=RUN | {"dataset": "owner/long-texts"}).data.datasets == ["owner/long-texts"]
    assert card_of(*patched("eabf"), run=RUN).data.datasets is None
    several = card_of(*patched("eabf"), run=RUN | {"dataset": ["owner/long-texts", "~/more.jsonl"]})
    assert several.data.datasets == ["owner/long-texts"]
    assert "samples of `owner/long-texts`, `more.jsonl` (" in several.text


def test_code_is_listed_with_its_hash(patched: Any) -> None:
    folder, report = patched("eabf")
    content = (folder / "modeling_eabf.py").read_bytes()
    rows = rows_of(card_of(folder, report), "file")
    assert rows["`modeling_eabf.py`"] == [f"{len(content):,}", f"`{hashlib.sha256(content).hexdigest()}`"]
    assert "sha256" not in card_of(*patched("abf")).text


@pytest.mark.parametrize("method", ["eabf", "native"])
def test_the_python_of_a_card_runs(method: str, patched: Any) -> None:
    folder, report = patched(method)
    card = card_of(folder, report, repo_id=str(folder))
    blocks = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, Any] = {}
        exec(compile(block, "README.md", "exec"), names)
        assert names["model"].config.max_position_embeddings == 256
        assert names["tokenizer"]("a")["input_ids"]
    assert ("trust_remote_code" in card.text) == (method == "eabf")


def test_the_server_is_told_the_window_and_to_trust_what_it_must(patched: Any) -> None:
    for method, trust in (("eabf", " --trust-remote-code"), ("native", "")):
        assert f"vllm serve me/mine{trust} --max-model-len 256\n" in card_of(*patched(method), repo_id="me/mine").text


@pytest.mark.parametrize(
    ("method", "form"),
    [
        ("eabf", "own"),
        ("logn", "own"),
        ("native", "native"),
        ("abf", "base"),
        ("ntk", "base"),
        *((method, method) for method in ("linear", "dynamic", "yarn", "ntk-by-parts")),
    ],
)
def test_every_form_has_its_runtimes(method: str, form: str, patched: Any) -> None:
    folder, report = patched(method)
    raw = json.loads((folder / "config.json").read_text())
    assert checkpoint_form(raw, needs_code=(folder / "modeling_eabf.py").exists()) == form
    said = rows_of(card_of(folder, report), "runtime")
    assert [row.name for row in RUNTIMES[form]] == list(said)[2:]  # type: ignore[index]


def test_a_form_without_the_scale_has_figures_of_its_own_and_applies_the_base_only(patched: Any) -> None:
    measured = {name: RUN["after"][name] for name in ("lengths", "perplexity")}
    worse = [entry | {"perplexity": 2 * entry["perplexity"]} for entry in measured["perplexity"]]
    compat = {
        "method": "abf",
        "summary": "Perplexity is doubled.",
        "as_trained": measured,
        "compat": measured | {"perplexity": worse},
    }
    card = card_of(*patched("abf"), run=RUN, compat=compat)
    assert "Perplexity is doubled." in card.text
    expected = [entry["perplexity"] for entry in worse]
    assert "| this checkpoint | " + " | ".join(f"{value:.2f}" for value in expected) + " |" in card.text
    assert "figures of the model as it was trained, not of this form" in card.text
    assert [result.metric_value for result in card.data.eval_results] == pytest.approx(expected, abs=1e-4)
    assert "No evaluation was run" not in card_of(*patched("abf"), compat=compat).text
    applies = [cells[0] for cells in list(rows_of(card, "runtime").values())[2:]]
    assert not [cell for cell in applies if cell.startswith(ALL)]
    assert "the base frequency only" in applies[0]


# ---- Reading a base's card -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\nlanguage: en\n---\nText", BaseCard(licence="mit", language=("en",))),
        ("---\nlicense: [mit]\nlanguage: [en, 7, de]\n---\n", BaseCard(licence="mit", language=("en", "de"))),
        ("---\nlicense: [mit, gpl-3.0]\n---\n", BaseCard()),
        ("---\nlicense: {a: b}\nlanguage: null\n---\n", BaseCard()),
        (
            "---\nlicense: other\nlicense_name: llama\nlicense_link: LICENSE\n---\n",
            BaseCard(licence="other", licence_name="llama", licence_link="LICENSE"),
        ),
        ("---\nmodel-index: 7\nlicense: mit\n---\n", BaseCard(licence="mit")),
        ("no metadata", BaseCard()),
        ("---\n- a list\n---\n", BaseCard()),
        ("---\nlicense: [unclosed\n---\n", BaseCard()),
        ("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", BaseCard()),
        ("---\nx: " + "[" * 5000 + "\n---\n", BaseCard()),
        ("", BaseCard()),
    ],
)
def test_what_a_base_card_says(text: str, expected: BaseCard, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_base_card(tmp_path) == expected


def test_a_base_without_a_readable_card(tmp_path: Path) -> None:
    assert read_base_card(tmp_path) == BaseCard()
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n\xff\xfe\n---\n")
    assert read_base_card(tmp_path) == BaseCard()
