"""Every option of `eabf eval` has an effect in a run, or the run refuses it and says what it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from eabf_cli.commands.eval import evaluate
from tests.conftest import Eabf
from tests.outcomes import assert_told

# What no run is configured with: the settings file, and how the result is shown.
_SHOWN = {"config", "as_json", "quiet", "verbose"}
# A value of each option, none of them the default.
VALUES: dict[str, tuple[Any, ...]] = {
    "model": ("other",), "revision": ("v2",), "trust_remote_code": (),
    "method": ("yarn",), "factor": (2,), "max_length": (1024,), "rope_theta": ("paper",), "original_length": (256,),
    "rebase": (), "unscaled_layers": ("none",),
    "text": ("a.txt",), "dataset": ("b.jsonl",), "dataset_split": ("test",), "num_documents": (3,),
    "lengths": (640,), "tasks": ("needles",), "trials": (3,), "depths": (0.5,), "target_tokens": (7,),
    "asks_verdict": (), "original": ("before",),
    "compare": ("yarn",), "reference": ("linear",), "finetune": (), "num_seeds": (2,), "samples": (3,),
    "train_dataset": ("c.jsonl",), "train_dataset_split": ("test",), "too_long": ("split",), "preset": ("paper",),
    "learning_rate": (1e-3,), "epochs": (3,), "tuning": ("lora",), "resume": (),
    "limit": (2,), "batch_size": (2,), "chat": (), "truncation_side": ("left",), "task_folder": (".",),
    "dtype": ("float16",), "device": ("cpu",), "seed": (7,),
    "output": ("elsewhere",), "overwrite": (), "dry_run": (),
}  # fmt: skip

# What an option needs beside it.
BESIDE = {"revision": ("-m", "somebody/model")}

_METHOD = {"factor", "max_length", "rope_theta", "original_length", "rebase", "unscaled_layers"}
_VERDICT = {"original"}
_SAMPLES = {"samples", "train_dataset", "train_dataset_split", "too_long"}
_TRAINING = _SAMPLES | {"preset", "learning_rate", "epochs", "tuning"}
_COMPARE = {"reference", "finetune", "num_seeds", "resume"} | _TRAINING
_SUITES = {"limit", "chat", "truncation_side", "task_folder", "batch_size"}
_NEEDLES = {"trials", "depths"}
_TEXTS = {"text", "dataset", "num_documents"}
_PLAIN = _METHOD | _VERDICT | _COMPARE | _SUITES | {"dataset_split"}
_OURS = _PLAIN | {"asks_verdict"}
_OF_SUITES = (_OURS - _SUITES) | {"compare"}
# --seeds without --finetune is refused by the comparison itself.
_UNTRAINED = (_OURS - _METHOD - {"reference", "finetune", "resume", "num_seeds"}) | {"method"}

# What sizes some tasks of ours is told, and not refused, where others of ours are measured.
_SIZES = _NEEDLES | _TEXTS | {"target_tokens"}

# Of each run, the options that have no effect in it.
REFUSED: dict[tuple[str, ...], set[str]] = {
    (): _PLAIN,
    ("--method", "eabf"): (_OURS - _METHOD) | {"compare"},
    ("--dataset", "d.jsonl"): _PLAIN - {"dataset_split"},
    ("--tasks", "perplexity"): _OURS | _NEEDLES,
    ("--tasks", "perplexity_by_position"): _OURS | _NEEDLES | {"target_tokens"},
    ("--tasks", "repeated_span"): _OURS | {"depths", "target_tokens"},
    ("--tasks", "multi_key"): _OURS | {"target_tokens"},
    ("--tasks", "passkey"): _OURS | _TEXTS | {"target_tokens"},
    ("--tasks", "ruler"): _OF_SUITES | _NEEDLES | _TEXTS | {"target_tokens"},
    ("--tasks", "ruler,context_gain"): _OF_SUITES | _NEEDLES,
    ("--verdict",): (_PLAIN - _VERDICT) | _NEEDLES | {"tasks", "method", "compare"},
    ("--compare", "linear,eabf", "-o", "out"): _UNTRAINED,
    ("--compare", "linear,eabf", "--tasks", "perplexity", "-o", "out"): _UNTRAINED | _NEEDLES,
    ("--compare", "linear,eabf", "--finetune", "-o", "out"): (_OURS - _METHOD - _COMPARE - {"batch_size"}) | {"method"},
}
FLAGS = {option.name: max(option.opts, key=len) for option in evaluate.params if option.name is not None}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the core is asked for, which then does nothing."""
    calls: list[Any] = []

    def stand_in(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            calls.append((name, arguments, options))
            raise click.exceptions.Exit(0)

        return call

    for module, name in (("run", "run_evaluation"), ("compare", "compare"), ("verdict", "verdict")):
        monkeypatch.setattr(f"eabf_cli.core.evals.{module}.{name}", stand_in(name))
    return calls


def test_every_option_is_tried() -> None:
    assert set(VALUES) | _SHOWN == set(FLAGS)


@pytest.mark.parametrize("run", REFUSED, ids=lambda run: " ".join(run) or "plain")
def test_an_option_changes_what_is_asked_for_or_is_said_to_have_no_effect(
    eabf: Eabf, asked: list[Any], workdir: Path, run: tuple[str, ...]
) -> None:
    for name, values in VALUES.items():
        if FLAGS[name] in run and not values:
            continue
        asked.clear()
        assert eabf("eval", *run, *BESIDE.get(name, ())).exit_code == 0
        (plain,) = asked
        asked.clear()
        result = eabf("eval", *run, *BESIDE.get(name, ()), FLAGS[name], *values)
        measures_ours = "--verdict" not in run and "ruler" not in run
        if name in REFUSED[run] & _SIZES and measures_ours:
            assert result.exit_code == 0, (name, result.stderr)
            assert f"warning: {FLAGS[name]} belongs to " in result.stderr
        elif name in REFUSED[run]:
            mode = next((flag for flag in run if flag in ("--verdict", "--compare", "--tasks")), "")
            assert_told(result, FLAGS[name], mode, exit_code=2)
            assert asked == []
        elif name == "num_seeds" and "--finetune" not in run:
            assert_told(result, "nothing is trained")
        else:
            assert result.exit_code == 0, (name, result.stderr)
            assert len(asked) == 1
            assert asked[0] != plain, name


def test_a_settings_file_may_hold_what_other_runs_need(eabf: Eabf, asked: list[Any], workdir: Path) -> None:
    (workdir / "eval.toml").write_text("trials = 3\ntarget_tokens = 7\n")
    assert eabf("eval", "--config", "eval.toml", "--tasks", "perplexity").exit_code == 0
    ((_, (config,), _),) = asked
    assert config.evaluation.target_tokens == 7
