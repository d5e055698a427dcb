from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from importlib import resources
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from eabf_cli.core.data.records import open_records
from eabf_cli.core.errors import DataError, InvalidConfigError
from eabf_cli.core.evals.language_modeling import context_rows
from eabf_cli.core.evals.retrieval import eval_templates, passkey_rows
from eabf_cli.core.evals.scoring import score_rows
from eabf_cli.core.evals.settings import QUICK_TASKS
from eabf_cli.core.evaluation import TASKS, EvalConfig, default_lengths, evaluate, evaluate_scores
from eabf_cli.core.patching import apply_method
from eabf_cli.core.scaling_config import RopeScalingConfig
from tests.byte_tokenizer import byte_tokenizer

WINDOW = 32
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")
DOCUMENTS = tuple(" ".join(WORDS[(n * k) % 10] for k in range(1, 40)) for n in (1, 3, 7))


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """Two layers with weights large enough that the tokens' losses differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=WINDOW,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def losses_of_last_tokens(model: Any, rows: list[list[int]], num_targets: int) -> list[float]:
    """transformers' own loss of each row's last tokens."""
    losses = []
    for row in rows:
        labels = [-100] * (len(row) - num_targets) + row[-num_targets:]
        with torch.no_grad():
            losses.append(model(input_ids=torch.tensor([row]), labels=torch.tensor([labels])).loss.item())
    return losses


@pytest.mark.parametrize("has_bos", [True, False])
def test_perplexity_agrees_with_a_loop_over_transformers_loss(has_bos: bool) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer(has_bos=has_bos)
    config = EvalConfig(tasks=("perplexity",), lengths=(16, 64), target_tokens=20, documents=DOCUMENTS)
    results = evaluate(model, tokenizer, config)["perplexity"]
    for result, length, num_targets in zip(results, (16, 64), (8, 20), strict=True):
        bos = [tokenizer.bos_token_id] if has_bos else []
        rows = [(bos + tokenizer(text, verbose=False)["input_ids"])[:length] for text in DOCUMENTS]
        losses = losses_of_last_tokens(model, rows, num_targets)
        perplexity = math.exp(statistics.mean(losses))
        stderr = perplexity * statistics.stdev(losses) / math.sqrt(3)
        assert result == {
            "length": length,
            "perplexity": pytest.approx(perplexity, rel=1e-5),
            "stderr": pytest.approx(stderr, rel=1e-4),
            "num_tokens": 3 * num_targets,
            "num_documents": 3,
        }


def test_context_gain_scores_the_same_tokens_with_more_before_them() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    config = EvalConfig(tasks=("context_gain",), lengths=(16, 32, 128), target_tokens=8, documents=DOCUMENTS)
    results = evaluate(model, tokenizer, config)["context_gain"]
    bodies = [tokenizer(text, verbose=False)["input_ids"][:127] for text in DOCUMENTS]
    expected = {
        context: losses_of_last_tokens(
            model, [[tokenizer.bos_token_id, *body[127 - (context - 1) :]] for body in bodies], 8
        )
        for context in (16, 32, 128)
    }
    assert [result["context"] for result in results] == [16, 32, 128]
    for result in results:
        losses = expected[result["context"]]
        differences = [a - b for a, b in zip(losses, expected[32], strict=True)]
        assert result["nll"] == pytest.approx(statistics.mean(losses), rel=1e-5)
        assert result["difference"] == pytest.approx(statistics.mean(differences), abs=1e-5)
        assert result["difference_stderr"] == pytest.approx(statistics.stdev(differences) / 3**0.5, abs=1e-5)
        assert (result["num_tokens"], result["num_documents"]) == (24, 3)


def test_context_rows_end_in_identical_targets_and_leave_short_documents_out() -> None:
    documents = [list(range(100, 200)), list(range(200, 260)), list(range(300, 420))]
    rows = context_rows(documents, [1], (8, 32, 64, 500), target_tokens=256)
    assert sorted({len(row.input_ids) for row in rows}) == [8, 32, 64]
    for document in (documents[0], documents[2]):
        mine = [row for row in rows if row.input_ids[-1] == document[62]]
        assert len(mine) == 3
        assert all(row.input_ids[0] == 1 for row in mine)
        assert {row.input_ids[row.targets[0].start : row.targets[0].end] for row in mine} == {tuple(document[59:63])}
    assert len(rows) == 6


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    folder = str(resources.files("eabf_cli") / "demo" / "eabf-tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def test_a_match_is_what_greedy_generation_gives(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    # Inside the window the demo model answers, beyond it it cannot: both outcomes are needed.
    rows = [*passkey_rows(tokenizer, 200, (0.2, 0.8), 4, seed=0), *passkey_rows(tokenizer, 800, (0.1,), 2, seed=0)]
    scores = score_rows(model, rows, batch_tokens=1024)
    outcomes = []
    for row in rows:
        target = row.targets[0]
        prompt, answer = list(row.input_ids[: target.start]), list(row.input_ids[target.start :])
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=len(answer),
            min_new_tokens=len(answer),
            do_sample=False,
        )
        outcomes.append(generated[0, len(prompt) :].tolist() == answer)
    found = [score.is_match for key in dict.fromkeys(row.targets[0].key for row in rows) for score in scores[key]]
    order = [row.targets[0].key for row in rows]
    assert found == [
        outcome for _, outcome in sorted(zip(order, outcomes, strict=True), key=lambda p: order.index(p[0]))
    ]
    assert set(outcomes) == {True, False}


@pytest.mark.parametrize("has_bos", [True, False])
def test_the_tasks_of_a_finetune_run_give_the_contract_s_keys_as_json(has_bos: bool) -> None:
    documents = tuple((text + " ") * 6 for text in DOCUMENTS)
    tokenizer = byte_tokenizer(has_bos=has_bos)
    model = tiny_model()
    apply_method(model, RopeScalingConfig(method="logn", factor=4.0))
    model.train()
    config = EvalConfig.quick(lengths=(WINDOW, 1024), documents=documents, num_passkey_trials=2, depths=(0.0, 1.0))
    calls: list[tuple[int, int]] = []
    result = evaluate(model, tokenizer, config, progress=lambda done, total: calls.append((done, total)))
    assert json.loads(json.dumps(result)) == result
    assert model.training
    assert (result["method"], result["original_max_position_embeddings"]) == ("logn", WINDOW)
    assert result["max_position_embeddings"] == 4 * WINDOW
    assert set(result) & set(TASKS) == set(QUICK_TASKS)
    assert [(e["length"], e["depth"], e["num_trials"]) for e in result["passkey"]] == [
        (1024, 0.0, 1),
        (1024, 1.0, 1),
    ]
    assert {e["template"]: e["num_trials"] for e in result["needles"]} == {
        "access-code": 4,
        "locker": 4,
        "flight": 4,
        "keyed-passkey": 8,
    }
    assert [(e["length"], e["num_trials"]) for e in result["repeated_span"]] == [(1024, 16)]
    assert [note.split(":")[0] for note in result["notes"]] == [
        f"{task} at {WINDOW}" for task in ("passkey", "needles", "repeated_span")
    ]
    assert result["effective_length"] is None
    assert calls[-1] == (result["num_tokens"], result["num_tokens"])


def losses_of_row(model: Any, row: list[int]) -> torch.Tensor:
    """transformers' loss of every token but the first, `(length - 1,)`."""
    ids = torch.tensor([row])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def test_perplexity_by_position_is_that_of_the_tokens_there() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    config = EvalConfig(tasks=("perplexity_by_position",), lengths=(16, 128), documents=DOCUMENTS)
    measured = evaluate_scores(model, tokenizer, config)
    rows = [[tokenizer.bos_token_id, *tokenizer(text, verbose=False)["input_ids"][:127]] for text in DOCUMENTS]
    losses = torch.stack([losses_of_row(model, row) for row in rows])
    entries = measured.result["perplexity_by_position"]
    assert (entries[0]["start"], entries[-1]["end"], len(entries)) == (1, 128, 16)
    for entry in entries:
        # Of a token at p, the loss is at p - 1.
        here = losses[:, entry["start"] - 1 : entry["end"] - 1].mean(1)
        assert entry["perplexity"] == pytest.approx(here.mean().exp().item(), rel=1e-5)
        assert measured.positions[entry["start"], entry["end"]] == pytest.approx(here.tolist(), abs=1e-5)


def test_documents_of_several_lengths_count_as_far_as_they_go_and_in_context_gain_only_the_longest() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    texts = (DOCUMENTS[0], DOCUMENTS[1][:100], DOCUMENTS[2], DOCUMENTS[0][:40])
    tasks = ("perplexity", "context_gain", "perplexity_by_position")
    config = EvalConfig(tasks=tasks, lengths=(32, 64, 128), target_tokens=8, documents=texts)
    result = evaluate(model, tokenizer, config)
    rows = [[tokenizer.bos_token_id, *tokenizer(text, verbose=False)["input_ids"]][:128] for text in texts]
    assert [len(row) for row in rows] == [128, 101, 128, 41]
    assert {entry["length"]: entry["num_documents"] for entry in result["perplexity"]} == {32: 4, 64: 3, 128: 2}
    assert {entry["context"]: entry["num_documents"] for entry in result["context_gain"]} == {32: 2, 64: 2, 128: 2}
    losses = [losses_of_row(model, row) for row in rows]
    for entry in result["perplexity_by_position"]:
        start, end = entry["start"], entry["end"]
        here = [loss[start - 1 : end - 1].mean() for loss, row in zip(losses, rows, strict=True) if len(row) >= end]
        assert entry["num_documents"] == len(here)
        assert entry["num_tokens"] == len(here) * (end - start)
        assert entry["perplexity"] == pytest.approx(torch.stack(here).mean().exp().item(), rel=1e-5)
    assert {entry["num_documents"] for entry in result["perplexity_by_position"]} == {4, 3, 2}


def test_key_tokens_are_told_by_the_window_and_scored_at_every_context(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    contexts, num_targets = (32, 512, 600), 16
    texts = tuple(read().text or "" for read in open_records("demo-long", split="heldout")[:6])
    config = EvalConfig(tasks=("context_gain",), lengths=contexts, target_tokens=num_targets, documents=texts)
    measured = evaluate_scores(model, tokenizer, config)
    bodies = [tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"][:599] for text in texts]
    losses = {
        context: torch.stack(
            [losses_of_row(model, [tokenizer.bos_token_id, *body[-(context - 1) :]])[-num_targets:] for body in bodies]
        )
        for context in contexts
    }
    is_key = (losses[32] - losses[512] > 2) & (losses[512] < 2)
    assert is_key.any()
    assert sorted(measured.key_tokens) == sorted(map(tuple, is_key.tolist()))
    assert measured.result["key_tokens"] == {
        "chosen_by": "this model",
        "short_context": 32,
        "long_context": 512,
        "num_tokens": int(is_key.sum()),
        "num_target_tokens": 6 * num_targets,
    }
    for entry in measured.result["context_gain"]:
        assert entry["key_nll"] == pytest.approx(losses[entry["context"]][is_key].mean().item(), abs=1e-4)
    # Another model is scored on the tokens that the reference chose.
    reference = tuple(tuple(index == 3 for index in range(num_targets)) for _ in texts)
    other = evaluate_scores(model, tokenizer, config, key_tokens=reference)
    assert other.key_tokens == reference
    assert other.result["key_tokens"] == {
        "chosen_by": "a reference model",
        "num_tokens": 6,
        "num_target_tokens": 6 * num_targets,
    }
    assert other.result["context_gain"][1]["key_nll"] == pytest.approx(losses[512][:, 3].mean().item(), abs=1e-4)


def test_scores_of_trials_and_documents_are_those_of_the_result() -> None:
    documents = tuple((text + " ") * 6 for text in DOCUMENTS)
    model, tokenizer = tiny_model(), byte_tokenizer()
    config = EvalConfig.with_trials(6, lengths=(WINDOW, 1200), documents=documents, depths=(0.0, 0.5, 1.0))
    measured = evaluate_scores(model, tokenizer, config)
    result = measured.result
    assert json.loads(json.dumps(result)) == result
    assert set(TASKS) < set(result)
    for entry in result["perplexity"]:
        losses = measured.documents[entry["length"]]
        assert entry["perplexity"] == pytest.approx(math.exp(statistics.mean(losses)))
    for entry in result["context_gain"]:
        assert entry["nll"] == pytest.approx(statistics.mean(measured.context[entry["context"]]))
    for task in ("passkey", "needles", "multi_key", "variable_tracking", "repeated_span"):
        trials, prompts = measured.trials[task], measured.prompts[task]
        assert list(trials) == list(prompts) == [1200]
        entries = result[task]
        total = sum(entry["accuracy"] * entry["num_trials"] for entry in entries)
        num_trials = sum(entry["num_trials"] for entry in entries)
        assert statistics.mean(trials[1200]) == pytest.approx(total / num_trials)
        assert len(prompts[1200]) == num_trials
    numbers = {task: sorted(prompts[1200]) for task, prompts in measured.prompts.items()}
    assert numbers == {
        "passkey": list(range(6)),
        "needles": sorted([*range(2)] * len(eval_templates())),
        "multi_key": sorted([*range(2)] * 3),
        "variable_tracking": [0, 1],
        "repeated_span": sorted([*range(2)] * 4),
    }


def test_the_result_does_not_depend_on_longer_calls_before() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    apply_method(model, RopeScalingConfig(method="dynamic", factor=4.0))
    config = EvalConfig(tasks=("perplexity",), lengths=(WINDOW, 2 * WINDOW, 4 * WINDOW), documents=DOCUMENTS)
    first, second = (evaluate(model, tokenizer, config)["perplexity"] for _ in range(2))
    assert first == second


def test_a_length_that_no_document_fills_is_null_and_noted() -> None:
    config = EvalConfig(tasks=("perplexity", "context_gain"), lengths=(16, 4096), documents=DOCUMENTS[:1])
    result = evaluate(tiny_model(), byte_tokenizer(), config)
    short, long = result["perplexity"]
    assert short["perplexity"] > 1
    assert short["stderr"] is None
    assert (long["perplexity"], long["num_documents"]) == (None, 0)
    assert [entry["context"] for entry in result["context_gain"]] == [16]
    assert result["notes"] == ["perplexity at 4,096: no document is that long"]


def test_documents_are_needed() -> None:
    with pytest.raises(DataError, match="no document"):
        evaluate(tiny_model(), byte_tokenizer(), EvalConfig(tasks=("perplexity",), documents=("",)))


@pytest.mark.parametrize(
    ("window", "target_window", "lengths"),
    [
        (512, 2048, [256, 512, 1024, 2048, 4096]),
        (512, 512, [256, 512, 1024]),
        (4096, 10_000, [2048, 4096, 8192, 10_000, 16_384, 20_000]),
    ],
)
def test_default_lengths(window: int, target_window: int, lengths: list[int]) -> None:
    assert default_lengths(window, target_window) == lengths


@pytest.mark.parametrize(
    "fields",
    [{"tasks": ("ppl",)}, {"tasks": ()}, {"lengths": (2,)}, {"depths": (1.5,)}, {"num_documents": 0}],
)
def test_nonsense_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError, match=next(iter(fields))):
        EvalConfig(**fields)


def test_the_defaults_can_be_read_without_torch() -> None:
    program = "import sys, eabf_cli.core.evaluation, eabf_cli.core.evals.table; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
