"""Standard task suites through lm-eval: its tasks, its data and its metrics, on a model that is already loaded.

The module imports neither torch nor lm-eval until a suite is opened, so that options can read the defaults.
"""

from __future__ import annotations

import difflib
import fnmatch
import logging
import os
import random
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eabf_cli.core.errors import DataError, InvalidConfigError
from eabf_cli.core.evals.settings import listed
from eabf_cli.core.evals.suite_results import Entry, average_entry, suite_entries

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from eabf_cli.core.evals.suite_model import InputCount, SuiteModel

logger = logging.getLogger(__name__)

PAPER_TASKS = tuple(
    f"longbench_{name}"
    for name in (
        "narrativeqa",
        "qasper",
        "multifieldqa_en",
        "hotpotqa",
        "2wikimqa",
        "musique",
        "gov_report",
        "qmsum",
        "multi_news",
        "trec",
        "triviaqa",
        "samsum",
    )
)
"""The 12 LongBench tasks whose mean the paper reports."""

ALIASES = {
    "paper": PAPER_TASKS,
    # What an extension may cost: knowledge, common sense, arithmetic, following instructions.
    "short": ("mmlu", "hellaswag", "arc_easy", "arc_challenge", "gsm8k", "ifeval"),
}
"""Our names for several of lm-eval's tasks."""

TRUNCATION_SIDES = ("left", "middle")

# Behind an input of the length that was asked for, tasks that make their own data put the beginning of the answer.
_ANSWER_PREFIX_ROOM = 64
_NUM_SUGGESTIONS = 5
# An error has at most three lines.
_MAX_TOLD = 3

Loaded = dict[str, Any]
"""What lm-eval's task manager loads: `tasks` and `groups` by name."""


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """Which of lm-eval's tasks to run, and how.

    Attributes:
        tasks: names of lm-eval's tasks, groups or tags (with * and ? for several), and of `ALIASES`.
        lengths: window lengths in tokens; None takes the model's target window. Tasks that make their own data
            (RULER) make it for each length; of all others, longer inputs are cut to each.
        limit: samples per task at most; None takes all.
        batch_size: inputs in a forward pass.
        apply_chat_template: ask in the form of a chat.
        truncation_side: where too long inputs are cut; None: the middle for LongBench, which is how its authors cut,
            the left for all others, as lm-eval does.
        include_path: a folder with task files of one's own.
        show_progress: lm-eval's bars on stderr.

    Raises:
        InvalidConfigError: a value that makes no sense.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...] | None = None
    limit: int | None = None
    batch_size: int = 1
    apply_chat_template: bool = False
    truncation_side: str | None = None
    include_path: Path | None = None
    show_progress: bool = False

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InvalidConfigError("no task is named")
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 4):
            raise InvalidConfigError(f"--lengths must be of at least 4 tokens each, got {listed(self.lengths)}")
        if self.include_path is not None and not self.include_path.is_dir():
            raise InvalidConfigError(f"--task-folder {self.include_path} does not exist, or is no folder")
        if self.limit is not None and self.limit < 1:
            raise InvalidConfigError(f"--limit must be at least 1, got {self.limit}")
        if self.batch_size < 1:
            raise InvalidConfigError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.truncation_side is not None and self.truncation_side not in TRUNCATION_SIDES:
            raise InvalidConfigError(
                f"--truncation-side must be one of {', '.join(TRUNCATION_SIDES)}, got {self.truncation_side!r}"
            )


def run_suites(config: SuiteConfig, model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """Run lm-eval's tasks on a model as it stands, patched or not.

    Returns:
        a dictionary ready for JSON: `suites` (entries, see `suite_entries`), `notes` on what was not measured,
        `lm_eval` (its version, and the settings), `wall_s`.

    Raises:
        InvalidConfigError: lm-eval is not installed, a task is unknown, or none fits its length.
        DataError: a task's data, or a package that it needs, is missing.
    """
    return Suites(config).run(model, tokenizer)


class Suites:
    """The tasks of a config, found in lm-eval before a model is loaded.

    Attributes:
        names: lm-eval's names, aliases and patterns resolved.

    Raises:
        InvalidConfigError: lm-eval is not installed, or a task is unknown.
    """

    def __init__(self, config: SuiteConfig) -> None:
        if find_spec("lm_eval") is None:
            raise InvalidConfigError(
                f"lm-eval is not installed, and --tasks {','.join(config.tasks)} needs it: pip install 'eabf-cli[eval]'"
            )
        self.config = config
        # lm-eval adds it to a task's settings, as it is when the task is loaded; one that is empty it would not keep.
        self._metadata: dict[str, Any] = {"max_seq_lengths": []}
        with _quiet():
            self._manager, self.names = _find_tasks(config, self._metadata)

    def check(self, tokenizer: Tokenizer) -> None:
        """Refuse what a tokenizer cannot do.

        Raises:
            InvalidConfigError: it has no chat template, and a chat is asked for.
        """
        if self.config.apply_chat_template and getattr(tokenizer, "chat_template", None) is None:
            raise InvalidConfigError("the tokenizer has no chat template: leave --chat out")

    def run(self, model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, Any]:
        """As `run_suites`."""
        config = self.config
        self.check(tokenizer)
        started = time.perf_counter()
        lengths = sorted(set(config.lengths or (_target_window(model),)))
        was_training = model.training
        entries: list[Entry] = []
        notes: list[str] = []
        try:
            # lm-eval loads tokenizers by name, with any code that comes with them: it gets these files alone.
            with _quiet(), tempfile.TemporaryDirectory() as folder:
                tokenizer.save_pretrained(folder)
                self._metadata["tokenizer"] = folder
                # The data of all tasks first: what is missing is told before hours are spent.
                loaded = {name: self._load(name, lengths[0], notes) for name in self.names}
                for name in self.names:
                    entries += self._run_lengths(name, lengths, loaded.pop(name), model, tokenizer, notes)
        finally:
            model.train(was_training)
        if not entries:
            raise InvalidConfigError(f"nothing could be measured: {notes[0]}")
        if "paper" in config.tasks:
            averages = [average_entry("paper", length, entries, PAPER_TASKS) for length in lengths]
            entries += [average for average in averages if average is not None]
        return {
            "suites": entries,
            "notes": notes,
            "lm_eval": self._settings(),
            "wall_s": time.perf_counter() - started,
        }

    def _run_lengths(
        self,
        name: str,
        lengths: list[int],
        loaded: Loaded | None,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        notes: list[str],
    ) -> list[Entry]:
        """One task or group at each length, shortest first; where nothing is cut, longer ones have the same inputs."""
        found: list[Entry] = []
        uncut: list[Entry] = []
        for index, length in enumerate(lengths):
            if uncut:
                found += [entry | {"length": length, "same_as": entry["length"]} for entry in uncut]
                continue
            if index > 0:
                loaded = self._load(name, length, notes)
            if loaded is None:
                continue
            logger.info("lm-eval: %s at %s tokens", name, f"{length:,}")
            makes_data = any(task.config.custom_dataset is not None for task in loaded["tasks"].values())
            room = length + _ANSWER_PREFIX_ROOM if makes_data else length
            try:
                entries, counts = self._measure(name, length, loaded, self._wrap(name, room, model, tokenizer))
            except InvalidConfigError as error:
                notes.append(f"{name} at {length:,}: {error}")
                continue
            found += entries
            if not makes_data and not any(count.num_cut for count in counts.values()):
                uncut = entries
        return found

    def _load(self, name: str, length: int, notes: list[str]) -> Loaded | None:
        """A task or group with its data; None, with a note, if its data cannot be made for this length.

        Raises:
            DataError: the data cannot be read, or a package is missing.
        """
        self._metadata["max_seq_lengths"] = [length]
        _seed()
        try:
            return self._manager.load([name])
        except ImportError as error:
            raise DataError(
                f"{name} needs a package that is not installed ({_first_line(error)}): pip install 'eabf-cli[eval]'"
            ) from error
        except ValueError as error:
            notes.append(f"{name} at {length:,}: {_first_line(error)}")
            return None
        except OSError as error:
            raise DataError(
                f"the data of {name} cannot be read ({_first_line(error)}): it is fetched from the Hub once and kept "
                "in HF_HOME; connect, and unset HF_HUB_OFFLINE"
            ) from error
        except LookupError as error:
            if isinstance(error, KeyError | IndexError):
                raise
            # NLTK's way to say that its data are not there.
            raise DataError(
                f"the data of {name} cannot be made ({_first_line(error)}): python -m nltk.downloader punkt_tab"
            ) from error

    def _measure(
        self, name: str, length: int, loaded: Loaded, suite_model: SuiteModel
    ) -> tuple[list[Entry], dict[str, InputCount]]:
        from lm_eval.defaults import DEFAULT_OTHER_SEED
        from lm_eval.evaluator import evaluate

        _score_at(length, loaded)
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
        results = evaluate(
            suite_model,
            loaded,
            limit=self.config.limit,
            log_samples=False,
            apply_chat_template=self.config.apply_chat_template,
            fewshot_as_multiturn=self.config.apply_chat_template,
        )
        return suite_entries(name, length, results, suite_model.input_counts), suite_model.input_counts

    def _wrap(self, name: str, max_length: int, model: PreTrainedModel, tokenizer: Tokenizer) -> SuiteModel:
        from eabf_cli.core.evals.suite_model import SuiteModel

        side = self.config.truncation_side or ("middle" if name.startswith("longbench") else "left")
        return SuiteModel(
            model,
            tokenizer,
            max_length=max_length,
            batch_size=self.config.batch_size,
            truncation_side=side,
            show_progress=self.config.show_progress,
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "version": version("lm_eval"),
            "limit": self.config.limit,
            "batch_size": self.config.batch_size,
            "apply_chat_template": self.config.apply_chat_template,
            "truncation_side": self.config.truncation_side,
        }


def _find_tasks(config: SuiteConfig, metadata: dict[str, Any]) -> tuple[Any, list[str]]:
    """lm-eval's index of tasks, and the names asked for with aliases and patterns resolved.

    Raises:
        InvalidConfigError: a name that lm-eval does not know.
    """
    from lm_eval.tasks import TaskManager

    wanted = [task for name in config.tasks for task in ALIASES.get(name, (name,))]
    if config.include_path is not None:
        # Reading lm-eval's own 14,000 files takes long, and may not be needed.
        manager = TaskManager(include_path=str(config.include_path), include_defaults=False, metadata=metadata)
        if all(fnmatch.filter(manager.all_tasks, name) for name in wanted):
            return manager, _resolve(wanted, manager.all_tasks)
    include_path = None if config.include_path is None else str(config.include_path)
    manager = TaskManager(include_path=include_path, metadata=metadata)
    return manager, _resolve(wanted, manager.all_tasks)


def _resolve(wanted: list[str], known: list[str]) -> list[str]:
    """Known names that the wanted ones stand for, each once, in order."""
    names: dict[str, None] = {}
    unknown = []
    for name in wanted:
        found = [name] if name in known else fnmatch.filter(known, name)
        names |= dict.fromkeys(found)
        if not found:
            nearest = difflib.get_close_matches(name, [*ALIASES, *known], n=_NUM_SUGGESTIONS)
            hint = f"did you mean {', '.join(nearest)}?" if nearest else "`lm-eval ls tasks` shows all"
            unknown.append(f"lm-eval {version('lm_eval')} has no task {name!r}: {hint}")
    if unknown:
        raise InvalidConfigError("\n".join(unknown[:_MAX_TOLD]))
    return list(names)


def _score_at(length: int, loaded: Loaded) -> None:
    """Make metrics that are named after lengths (RULER's) measure this one, with a standard error.

    RULER's tasks and their group know some lengths only, and lm-eval has no error for their own kind of mean.
    """
    from lm_eval.api.metrics import mean

    for task in loaded["tasks"].values():
        aggregation = task.aggregation()
        if any(metric.isdigit() for metric in aggregation):
            aggregation[str(length)] = mean
    for group in loaded.get("groups", {}).values():
        for aggregate in group.aggregate_metric_list or ():
            if aggregate.metric.isdigit():
                aggregate.metric = str(length)


def _target_window(model: PreTrainedModel) -> int:
    from eabf_cli.core.patching import describe_patch

    scaling = describe_patch(model)
    if scaling is None or scaling.original_max_position_embeddings is None:
        return int(model.config.get_text_config().max_position_embeddings)
    return scaling.max_position_embeddings


def _seed() -> None:
    """As lm-eval's own command does, so that tasks which make their data make the same."""
    import numpy
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    numpy.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


def _first_line(error: Exception) -> str:
    lines = [line.strip(" *") for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out lm-eval's warnings, and what its tasks print on stdout, which is the result's."""
    lm_eval_logger = logging.getLogger("lm_eval")
    before = lm_eval_logger.level
    lm_eval_logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"fuzzywuzzy|jieba|lm_eval|rouge")
            yield
    finally:
        lm_eval_logger.setLevel(before)
