from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from eabf_cli.core.checkpoint import load_model, load_tokenizer
from eabf_cli.core.data.records import open_records
from eabf_cli.core.demo import DEMO_DATASET, DEMO_MODEL
from eabf_cli.core.errors import DataError, InvalidConfigError
from eabf_cli.core.evals.suites import ALIASES, SuiteConfig, Suites, run_suites
from eabf_cli.core.patching import apply_method, describe_patch

pytestmark = pytest.mark.usefixtures("one_thread")

# Beyond the original window of 512, inside it, and short.
CONTEXT_TOKENS = (700, 300, 40)
CONTINUATIONS = (" He went home.", " The sun was warm", " Nothing at all happened")
NUM_NEW = 6

SCORES = """
def nats(doc, results):
    value, is_greedy = results[0]
    return {f"nats {doc['index']}": value, "is_greedy": float(is_greedy)}

def total(doc, results):
    return {f"nats {doc['index']}": results[0]}

def same(doc, results):
    return {f"same {doc['index']}": float(results[0] == doc["expected"]), "empty": float(not results[0])}
"""

# Like RULER's: the data are made for each length with the tokenizer that is named, and the metric is the length.
MAKE_DATA = """
import datasets
from transformers import AutoTokenizer

def make(max_seq_lengths, tokenizer, **kwargs):
    if max_seq_lengths[0] < 64:
        raise ValueError("nothing can be made that short")
    encode = AutoTokenizer.from_pretrained(tokenizer)
    rows = []
    for length in max_seq_lengths:
        text = encode.decode(encode(" and so on" * length, add_special_tokens=False)["input_ids"][: length - 9])
        rows += [{"input": text, "max_length": length, "right": right} for right in (True, True, True, False)]
    return {"test": datasets.Dataset.from_list(rows)}

def score(doc, results):
    return {"4096": -1.0} | {str(doc["max_length"]): float(doc["right"])}

def average(scores):
    return sum(score for score in scores if score != -1)
"""

FILES = {
    "scores.py": SCORES,
    "make_data.py": MAKE_DATA,
    "rows_yaml": """
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "{{continuation}}"
target_delimiter: ""
""",
    "scored.yaml": """
include: rows_yaml
task: scored
output_type: loglikelihood
process_results: !function scores.nats
""",
    "whole.yaml": """
include: rows_yaml
task: whole
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
process_results: !function scores.total
""",
    "said.yaml": f"""
include: rows_yaml
task: said
output_type: generate_until
process_results: !function scores.same
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {NUM_NEW}}}
""",
    "longbench_said.yaml": """
include: said.yaml
task: longbench_said
""",
    "offline.yaml": """
task: offline
dataset_path: nobody/no-such-dataset
test_split: test
output_type: generate_until
doc_to_text: context
doc_to_target: ""
""",
    "made.yaml": """
task: made
custom_dataset: !function make_data.make
dataset_path: ""
test_split: test
output_type: generate_until
doc_to_text: "{{input}}"
doc_to_target: ""
process_results: !function make_data.score
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 2}
metric_list: [{metric: "4096", aggregation: !function make_data.average, higher_is_better: true}]
""",
    "family.yaml": """
group: family
task: [made]
aggregate_metric_list: [{metric: "4096", weight_by_size: false}]
""",
}


@pytest.fixture(scope="module")
def model() -> Any:
    loaded = load_model(DEMO_MODEL, dtype="float32", device="cpu")
    apply_method(loaded, {"rope_type": "eabf", "factor": 4.0})
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture(scope="module")
def contexts(tokenizer: Any) -> list[str]:
    text = next(iter(open_records(DEMO_DATASET, split="heldout")))().text or ""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.decode(ids[:length]).rstrip() for length in CONTEXT_TOKENS]


@pytest.fixture
def folder(tmp_path: Path, contexts: list[str]) -> Path:
    """Task files as lm-eval reads them."""
    write_rows(tmp_path, contexts, ["" for _ in contexts])
    for name, text in FILES.items():
        (tmp_path / name).write_text(text.replace("ROWS", f"{tmp_path}/rows.jsonl"))
    return tmp_path


def write_rows(folder: Path, contexts: Sequence[str], expected: Sequence[str]) -> None:
    rows = [
        {"index": index, "context": context, "continuation": continuation, "expected": text}
        for index, (context, continuation, text) in enumerate(zip(contexts, CONTINUATIONS, expected, strict=True))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, task: str, model: Any, tokenizer: Any, *lengths: int, **settings: Any) -> dict[str, Any]:
    config = SuiteConfig(tasks=(task,), lengths=lengths, include_path=folder, **settings)
    result = run_suites(config, model, tokenizer)
    json.dumps(result, allow_nan=False)
    return result


def values(entry: dict[str, Any]) -> dict[str, float]:
    return {metric["metric"]: metric["value"] for metric in entry["metrics"]}


@torch.inference_mode()
def log_likelihood(model: Any, ids: Sequence[int], num_scored: int) -> float:
    """Sum of the log-probabilities of the last `num_scored` tokens."""
    logits = model(input_ids=torch.tensor([list(ids)])).logits[0, -num_scored - 1 : -1].double()
    chosen = torch.tensor(list(ids[-num_scored:]))
    return float(logits.log_softmax(-1)[torch.arange(num_scored), chosen].sum())


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, ids: Sequence[int]) -> str:
    """The next `NUM_NEW` tokens, each from a forward pass of its own without a cache."""
    grown = list(ids)
    for _ in range(NUM_NEW):
        grown.append(int(model(input_ids=torch.tensor([grown])).logits[0, -1].argmax()))
        if grown[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(grown[len(ids) :], skip_special_tokens=True))


def cut(ids: list[int], room: int, side: str) -> list[int]:
    if len(ids) <= room:
        return ids
    return ids[len(ids) - room :] if side == "left" else ids[: room // 2] + ids[len(ids) - (room - room // 2) :]


@pytest.mark.parametrize(("length", "side", "num_cut"), [(1024, "left", 0), (256, "left", 2), (256, "middle", 2)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods_are_those_of_a_plain_forward_on_what_fits(
    folder: Path, model: Any, tokenizer: Any, contexts: list[str], length: int, side: str, num_cut: int, batch_size: int
) -> None:
    result = run(folder, "scored", model, tokenizer, length, truncation_side=side, batch_size=batch_size)
    (entry,) = result["suites"]
    for index, (context, continuation) in enumerate(zip(contexts, CONTINUATIONS, strict=True)):
        before = tokenizer(context)["input_ids"]
        scored = tokenizer(context + continuation)["input_ids"][len(before) :]
        # The last token is predicted, not read.
        ids = cut(before, length + 1 - len(scored), side) + scored
        expected = log_likelihood(model, ids, len(scored))
        assert values(entry)[f"nats {index}"] == pytest.approx(expected, rel=1e-5)
    assert (entry["num_samples"], entry["num_inputs"], entry["num_cut"]) == (3, 3, num_cut)
    assert entry["max_input_tokens"] == len(tokenizer(contexts[0] + CONTINUATIONS[0])["input_ids"])


@pytest.mark.parametrize(("length", "side", "num_cut"), [(1024, "left", 0), (256, "left", 2), (256, "middle", 2)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_greedy_decoding_after_what_fits(
    folder: Path, model: Any, tokenizer: Any, contexts: list[str], length: int, side: str, num_cut: int, batch_size: int
) -> None:
    expected = [
        greedy(model, tokenizer, cut(tokenizer(context)["input_ids"], length - NUM_NEW, side)) for context in contexts
    ]
    write_rows(folder, contexts, expected)
    result = run(folder, "said", model, tokenizer, length, truncation_side=side, batch_size=batch_size)
    (entry,) = result["suites"]
    assert values(entry) == {"same 0": 1.0, "same 1": 1.0, "same 2": 1.0, "empty": 0.0}
    assert (entry["num_inputs"], entry["num_cut"]) == (3, num_cut)


def test_another_answer_is_told_from_the_right_one(
    folder: Path, model: Any, tokenizer: Any, contexts: list[str]
) -> None:
    expected = [greedy(model, tokenizer, tokenizer(context)["input_ids"]) for context in contexts]
    write_rows(folder, contexts, [expected[0], expected[1] + "!", expected[2]])
    (entry,) = run(folder, "said", model, tokenizer, 1024)["suites"]
    assert values(entry) == {"same 0": 1.0, "same 1": 0.0, "same 2": 1.0, "empty": 0.0}


def test_longbench_loses_its_middle_and_other_tasks_their_left(
    folder: Path, model: Any, tokenizer: Any, contexts: list[str]
) -> None:
    def expected(side: str) -> list[str]:
        return [
            greedy(model, tokenizer, cut(tokenizer(context)["input_ids"], 128 - NUM_NEW, side)) for context in contexts
        ]

    left, middle = expected("left"), expected("middle")
    assert left[0] != middle[0]
    for task, texts in (("said", left), ("longbench_said", middle)):
        write_rows(folder, contexts, texts)
        (entry,) = run(folder, task, model, tokenizer, 128)["suites"]
        assert values(entry)["same 0"] == 1.0, task


def test_whole_texts_are_scored_in_pieces_where_they_do_not_fit(
    folder: Path, model: Any, tokenizer: Any, contexts: list[str]
) -> None:
    length = 256
    (entry,) = run(folder, "whole", model, tokenizer, length)["suites"]
    for index, context in enumerate(contexts):
        ids = tokenizer(context)["input_ids"]
        prefix, total = [tokenizer.bos_token_id], 0.0
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            # The last piece is filled up with tokens before it.
            before = (prefix + ids)[: start + 1][-(length + 1 - len(piece)) :]
            total += log_likelihood(model, before + piece, len(piece))
        assert values(entry)[f"nats {index}"] == pytest.approx(total, rel=1e-5)
    assert (entry["num_inputs"], entry["num_cut"]) == (3, 2)


def test_what_was_not_cut_is_not_run_again_at_longer_lengths(
    folder: Path, model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        result = run(folder, "scored", model, tokenizer, 2048, 512, 1024)
    entries = result["suites"]
    assert [(entry["length"], entry["num_cut"], entry["same_as"]) for entry in entries] == [
        (512, 1, None),
        (1024, 0, None),
        (2048, 0, 1024),
    ]
    assert entries[1]["metrics"] == entries[2]["metrics"] != entries[0]["metrics"]
    assert [record.getMessage() for record in caplog.records] == [
        "lm-eval: scored at 512 tokens",
        "lm-eval: scored at 1,024 tokens",
    ]


def test_tasks_that_make_their_data_make_it_for_each_length(folder: Path, model: Any, tokenizer: Any) -> None:
    result = run(folder, "family", model, tokenizer, 32, 64, 192)
    assert result["notes"] == ["family at 32: nothing can be made that short"]
    entries = {(entry["task"], entry["length"]): entry for entry in result["suites"]}
    assert set(entries) == {("made", 64), ("made", 192), ("family", 64), ("family", 192)}
    for (task, length), entry in entries.items():
        (metric,) = entry["metrics"]
        # Three of four: the sample variance is 1/4, the error of the mean sqrt(1/4 / 4).
        assert (metric["metric"], metric["value"]) == ("score", 0.75)
        assert metric["stderr"] == pytest.approx(0.25)
        assert (entry["suite"], entry["num_inputs"], entry["num_cut"]) == ("family", 4, 0), task
        assert entry["max_input_tokens"] == length - 9


def test_the_models_window_is_the_length_unless_one_is_given(folder: Path, model: Any, tokenizer: Any) -> None:
    config = SuiteConfig(tasks=("scored",), include_path=folder, limit=1)
    (entry,) = run_suites(config, model, tokenizer)["suites"]
    assert (entry["length"], entry["num_samples"]) == (2048, 1)


def test_an_answer_that_fills_the_window_is_a_note_and_alone_an_error(folder: Path, model: Any, tokenizer: Any) -> None:
    result = run(folder, "said", model, tokenizer, NUM_NEW, 1024)
    assert result["notes"] == ["said at 6: answers may have 6 tokens, which leaves no room for an input in 6"]
    assert [entry["length"] for entry in result["suites"]] == [1024]
    with pytest.raises(InvalidConfigError, match="nothing could be measured: said at 6"):
        run(folder, "said", model, tokenizer, NUM_NEW)


def test_the_model_stays_as_it_was_and_stdout_is_left_alone(
    folder: Path, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = torch.arange(5, 605)[None]
    with torch.inference_mode():
        before = model(ids).logits
    patch, padding = describe_patch(model), tokenizer.pad_token
    model.train()
    try:
        run(folder, "said", model, tokenizer, 256, batch_size=3)
        assert model.training
    finally:
        model.eval()
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, before)
    assert (describe_patch(model), tokenizer.pad_token) == (patch, padding)
    told = capsys.readouterr()
    assert (told.out, "generate_until" in told.err) == ("", False)


def test_data_that_cannot_be_had_is_told_before_anything_runs(
    folder: Path, model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = SuiteConfig(tasks=("said", "offline"), lengths=(256,), include_path=folder)
    with pytest.raises(DataError, match=r"the data of offline cannot be read .*nobody/no-such-dataset.*HF_HUB_OFFLINE"):
        run_suites(config, model, tokenizer)
    assert caplog.records == []


def test_a_chat_needs_a_template(folder: Path, model: Any, tokenizer: Any) -> None:
    assert tokenizer.chat_template is None
    with pytest.raises(InvalidConfigError, match="no chat template"):
        run(folder, "said", model, tokenizer, 256, apply_chat_template=True)


@pytest.mark.slow
def test_unknown_tasks_are_answered_with_the_nearest_names() -> None:
    with pytest.raises(InvalidConfigError, match=r"no task 'longbench_qaspr': did you mean .*longbench_qasper"):
        Suites(SuiteConfig(tasks=("paper", "short", "ruler", "longbench_qaspr")))


def test_several_unknown_tasks_are_told_at_once() -> None:
    from eabf_cli.core.evals.suites import _resolve

    with pytest.raises(InvalidConfigError) as told:
        _resolve(["pasky", "said", "saids", "zzzzz", "yyyyy"], ["said", "sun"])
    lines = str(told.value).splitlines()
    assert [line.split("'")[1] for line in lines] == ["pasky", "saids", "zzzzz"]
    assert "did you mean said" in lines[1]
    assert "lm-eval ls tasks" in lines[2]


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InvalidConfigError, match=r"--tasks ruler,paper needs it: pip install 'eabf-cli\[eval\]'"):
        Suites(SuiteConfig(tasks=("ruler", "paper")))


def test_a_task_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="nofolder does not exist"):
        SuiteConfig(tasks=("scored",), include_path=tmp_path / "nofolder")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ()}, "no task"),
        ({"lengths": (2,)}, "at least 4 tokens"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"truncation_side": "right"}, "left, middle"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        SuiteConfig(**({"tasks": ("ruler",)} | settings))


def test_the_paper_has_twelve_tasks() -> None:
    assert len(set(ALIASES["paper"])) == 12
