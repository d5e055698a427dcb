"""The documentation says what the code does: generated parts are current, examples are real."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest

from eabf_cli.cli import main as app
from tests.lm_eval_task import write_task
from tests.transformers_457 import PYTHON_457, needs_457

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted(
    str(path.relative_to(REPOSITORY)) for path in (*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"))
)
HUB_PREFIXES = ("https://", "http://")


def load_script(name: str) -> ModuleType:
    """A script of the repository as a module, without running it."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def eabf_lines(text: str) -> list[str]:
    """Every `eabf ...` command line: of shell blocks, and of the examples in help texts."""
    blocks = "\n".join(code_blocks(text, "sh") + code_blocks(text, "text"))
    found = re.findall(r"^\s*(eabf (?!\[)[a-z].*)$", blocks, flags=re.MULTILINE)
    return [line.split(" #")[0].strip() for line in found]


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):", read("Makefile"), flags=re.MULTILINE))


DOCUMENTED_COMMANDS = sorted(
    {line for page in PAGES for line in eabf_lines(read(page))}
    | set(
        eabf_lines(
            "```sh\n" + "".join(re.findall(r"^\t\$\(BIN\)/(eabf .*\n)", read("Makefile"), flags=re.MULTILINE)) + "```"
        )
    )
)


def test_there_are_commands_to_check() -> None:
    assert {shlex.split(line)[1] for line in DOCUMENTED_COMMANDS} == set(app.commands)


@pytest.mark.parametrize("line", DOCUMENTED_COMMANDS)
def test_a_documented_command_parses(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What another documented command writes, and what a user has.
    for name in re.findall(r"\S+\.toml", line):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("factor = 4.0\n")
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(line.split(" > ")[0])[1:]
    command = app.commands[arguments[0]]
    # Parses options and values as the real run would, and stops before the work.
    command.make_context(
        arguments[0], arguments[1:], parent=click.Context(app, info_name="eabf", **app.context_settings)
    )


@pytest.mark.parametrize("page", PAGES)
def test_an_option_named_in_the_text_exists(page: str) -> None:
    known = {flag for command in app.commands.values() for option in command.params for flag in option.opts}
    known |= {flag for command in app.commands.values() for option in command.params for flag in option.secondary_opts}
    known |= {"--help", "--version"}
    spans = re.findall(r"`[^`\n]*`", re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE))
    named = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)}
    assert named <= known


@pytest.mark.parametrize("page", PAGES)
def test_a_make_target_named_in_a_page_exists(page: str) -> None:
    text = "\n".join([*code_blocks(read(page), "sh"), *re.findall(r"`([^`\n]*)`", read(page))])
    commands = re.findall(r"^make((?: +(?:[a-z0-9-]+|PYTHON=\S+))+)", text, flags=re.MULTILINE)
    named = {word for words in commands for word in words.split() if "=" not in word}
    assert named <= makefile_targets()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", read(page))
    for target in targets:
        if not target.startswith(HUB_PREFIXES):
            assert ((REPOSITORY / page).parent / target).is_file(), f"{page} links to {target}"


def test_generated_pages_are_current() -> None:
    pages = load_script("make_docs").render_pages()
    stale = [path.name for path, content in pages.items() if path.read_text(encoding="utf-8") != content]
    assert not stale, "run `make docs`"


def test_every_block_is_used() -> None:
    blocks = set(load_script("make_docs").BLOCKS)
    used = {name for page in PAGES for name in re.findall(r"<!-- begin ([\w ]+) -->", read(page))}
    assert used == blocks


def test_readme_lists_what_is_supported() -> None:
    from eabf_cli.core.architectures import SUPPORTED_MODEL_TYPES
    from eabf_cli.modeling_eabf import FAMILIES

    readme = read("README.md")
    for name, expected in (("supported model types", SUPPORTED_MODEL_TYPES), ("exported families", FAMILIES)):
        block = readme.split(f"<!-- begin {name} -->")[1].split(f"<!-- end {name} -->")[0]
        assert re.findall(r"`(\w+)`", block) == list(expected)


def test_cli_reference_has_every_option() -> None:
    reference = read("docs/cli.md")
    for name, command in app.commands.items():
        section = reference.split(f"\n## eabf {name}\n")[1].split("\n## ")[0]
        for option in command.params:
            shown = max(option.opts, key=len) if isinstance(option, click.Option) else option.human_readable_name
            assert shown in section, f"{name} {option.name}"


def test_checkpoint_example_is_a_valid_config() -> None:
    from eabf_cli.core.checkpoint_format import split_config

    (example,) = code_blocks(read("docs/method.md"), "json")
    scaling = split_config(json.loads(example)).scaling
    assert scaling is not None
    assert (scaling.method, scaling.unscaled_layers, scaling.max_position_embeddings) == ("eabf", (0, 1), 16_384)


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `eabf-runs/demo` in it, as `make demo` leaves one, but untrained."""
    from eabf_cli.core.patch_checkpoint import PatchConfig, patch_checkpoint

    folder = tmp_path_factory.mktemp("readme")
    patch_checkpoint(PatchConfig(output=folder / "eabf-runs" / "demo"))
    return folder


@pytest.mark.parametrize(
    "block",
    [block for page in ("README.md", "docs/index.md", "docs/api.md") for block in code_blocks(read(page), "python")],
)
def test_python_of_a_page_runs(
    block: str, demo_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_run)
    exec(compile(block, "page", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> dict[str, dict[str, Any]]:
    """What each function of the API page returns: small runs, and the finetune that is kept in docs/results/."""
    import eabf_cli

    folder = tmp_path_factory.mktemp("results")
    text = folder / "text.txt"
    text.write_text("The sun was warm and the house stood open to a mild wind from the hills. " * 20)
    extended = folder / "extended"
    eabf_cli.patch_checkpoint(eabf_cli.PatchConfig(model=str(tiny_llama_folder), output=extended))
    exported = eabf_cli.export_checkpoint(eabf_cli.ExportConfig(source=str(extended), output=folder / "exported"))
    return {
        "patch_checkpoint": eabf_cli.patch_checkpoint(eabf_cli.PatchConfig(dry_run=True)),
        "finetune": json.loads(read("docs/results/demo-finetune.json")),
        "evaluate": eabf_cli.evaluate(
            eabf_cli.load_model(tiny_llama_folder),
            eabf_cli.load_tokenizer(tiny_llama_folder),
            eabf_cli.EvalConfig.with_trials(1, lengths=(32, 64, 512)),
        ),
        "compute_attention_entropy": eabf_cli.compute_attention_entropy(
            eabf_cli.EntropyConfig(text=text, length=64, num_documents=1)
        ),
        "summarize": eabf_cli.summarize(eabf_cli.SummarizeConfig(files=(text,), model="eabf-tiny", max_new_tokens=4)),
        **results_of_eval(folder, text, tiny_llama_folder, extended),
        "export_checkpoint": exported,
    }


def results_of_eval(folder: Path, text: Path, model: Path, extended: Path) -> dict[str, dict[str, Any]]:
    """What the functions behind `eabf eval` return."""
    import eabf_cli

    evaluation = eabf_cli.EvalConfig(tasks=("perplexity", "context_gain", "passkey"), lengths=(64, 256))
    run = eabf_cli.EvalRunConfig(model=str(model), text=(text,), evaluation=evaluation)
    suites = eabf_cli.SuiteConfig(tasks=("sun",), lengths=(64,), include_path=write_task(folder))
    return {
        "run_evaluation": eabf_cli.run_evaluation(run),
        "compare": eabf_cli.compare(eabf_cli.CompareConfig(run=run, methods=("yarn", "eabf"))),
        "verdict": eabf_cli.verdict(eabf_cli.VerdictConfig(run=replace(run, model=str(extended)))),
        "run_suites": eabf_cli.run_suites(suites, eabf_cli.load_model(model), eabf_cli.load_tokenizer(model)),
    }


def test_results_have_the_keys_that_the_api_page_names(results: dict[str, dict[str, Any]]) -> None:
    section = read("docs/api.md").split("\n## Results\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)`.*? \| (.*) \|$", section, flags=re.MULTILINE)
    assert {function for function, _ in rows} == set(results)
    for function, cell in rows:
        # What stands in brackets describes the value before it.
        named = re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", cell))
        assert named
        assert set(named) <= set(results[function]), function
        for name, inside in re.findall(r"`(\w+)` \(([^)]*)\)", cell):
            described = set(re.findall(r"`(\w+)`", inside)) - set(results)
            assert described <= inner_keys(results[function][name]), (function, name)


def inner_keys(value: Any) -> set[str]:
    """The keys of a dictionary and of those inside it, or of a list of dictionaries."""
    inside = list(value.values()) if isinstance(value, dict) else value
    entries = [entry for entry in inside or () if isinstance(entry, dict)]
    return {key for entry in entries for key in entry} | (set(value) if isinstance(value, dict) else set())


@needs_457
def test_readme_python_for_transformers_alone_runs_in_457(demo_run: Path) -> None:
    (block,) = (block for block in code_blocks(read("README.md"), "python") if "trust_remote_code" in block)
    assert PYTHON_457 is not None
    run = subprocess.run([PYTHON_457, "-c", block], cwd=demo_run, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("<s>")


def result_of(**models: dict[str, Any]) -> dict[str, Any]:
    return {"original_max_position_embeddings": 8, "max_position_embeddings": 32, **models}


def test_plotted_values_are_those_of_the_result(tmp_path: Path) -> None:
    script = load_script("plot_result")
    passkey = [
        {"length": 8, "depth": 0.0, "accuracy": 1.0, "num_trials": 3},
        {"length": 8, "depth": 1.0, "accuracy": 0.0, "num_trials": 1},
        {"length": 32, "depth": 0.5, "accuracy": 0.5, "num_trials": 2},
    ]
    perplexity = [{"length": 8, "perplexity": 20.0}, {"length": 32, "perplexity": 25.0}]
    figure = script.plot_result(
        result_of(original={"perplexity": perplexity, "passkey": passkey}, before=None, after=None, control=None)
    )
    losses, passkeys = (axes.lines[0] for axes in figure.axes)
    assert list(zip(losses.get_xdata(), losses.get_ydata(), strict=True)) == [(8, 20.0), (32, 25.0)]
    assert list(zip(passkeys.get_xdata(), passkeys.get_ydata(), strict=True)) == [(8, 75.0), (32, 50.0)]
    figure.savefig(tmp_path / "result.png")
