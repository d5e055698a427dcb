"""Write what the documentation takes from the code: docs/cli.md, and the marked blocks of other pages.

    python scripts/make_docs.py

A block lies between `<!-- begin NAME -->` and `<!-- end NAME -->`; `BLOCKS` says what goes in. A test fails
while a page differs from what this script would write.
"""

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import click
import torch

from eabf_cli import _EXPORTS
from eabf_cli.cli import main as app
from eabf_cli.core.architectures import SUPPORTED_MODEL_TYPES
from eabf_cli.core.card.runtimes import RUNTIMES, runtimes_table
from eabf_cli.core.checkpoint_format import needs_modeling_file
from eabf_cli.core.finetune.run import comparison_table
from eabf_cli.core.frequencies import choose_theta, critical_theta
from eabf_cli.core.methods import METHODS, Method
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.modeling_eabf import FAMILIES, logit_scale

REPOSITORY = Path(__file__).resolve().parent.parent
RESULT = REPOSITORY / "docs" / "results" / "demo-finetune.json"
CLI_PAGE = REPOSITORY / "docs" / "cli.md"
HELP_WIDTH = 100

# How `modeling_eabf.logit_scale` reads in the symbols of docs/method.md.
_SCALES = {
    None: "",
    "eabf": "max(1, ln i / ln c)",
    "logn": "max(1, ln i / ln c)",
    "native": "1 + ln(1 + floor(p / c)) / ln c",
}
# Model, its theta, its window, the target: those that docs/method.md works through.
_THETA_EXAMPLES = (
    ("Llama-2", 10_000.0, 4096, 16_384),
    ("a model with theta 1,000,000", 1_000_000.0, 40_960, 163_840),
    ("eabf-tiny, the demo model", 10_000.0, 512, 2048),
)
_SCALE_WINDOW = 4096


def cli_reference() -> str:
    """The page of all commands, each as its `--help` prints it."""
    group = click.Context(app, info_name="eabf", terminal_width=HELP_WIDTH, **app.context_settings)
    parts = ["# Command line", "Written by `make docs` from the commands themselves.", _help_block(app, group)]
    for name, command in sorted(app.commands.items()):
        parts += [f"## eabf {name}", _help_block(command, click.Context(command, info_name=name, parent=group))]
    return "\n\n".join(parts) + "\n"


def _help_block(command: click.Command, context: click.Context) -> str:
    return f"```text\n{command.get_help(context)}\n```"


def method_table() -> str:
    """One row for each method of the table."""
    header = (
        "Method",
        "What it does",
        "Logit scale",
        "Exempt layers",
        "rope_theta",
        "Reference",
        "A Llama's checkpoint",
    )
    return _table(header, (_method_row(method) for method in METHODS.values()))


def _method_row(method: Method) -> tuple[str, ...]:
    names = ", alias ".join(f"`{name}`" for name in (method.name, *method.aliases))
    needs_code = needs_modeling_file("llama", RopeScalingConfig(method=method.name))
    return (
        names,
        method.summary,
        _SCALES[method.logit_scale],
        ", ".join(map(str, method.unscaled_layers)),
        "free" if method.raises_theta else "by the method",
        method.reference,
        "model type of ours" if needs_code else "stock",
    )


def theta_table() -> str:
    """The rules for `rope_theta` worked out for a few models."""
    rows = []
    for name, theta, window, target in _THETA_EXAMPLES:
        chosen, _ = choose_theta(None, theta, window, target)
        auto = critical_theta(theta, window, target)
        rows.append((name, f"{theta:,.0f}", f"{window:,}", f"{target:,}", _rounded(auto), _rounded(chosen)))
    return _table(("Model", "theta", "c", "L", "`auto`", "default"), rows)


def _rounded(value: float) -> str:
    """To three digits."""
    return f"{float(f'{value:.3g}'):,.0f}"


def scale_table() -> str:
    """t at a few 1-based positions, for the stepless and the stepped form."""
    positions = [_SCALE_WINDOW // 2, *(_SCALE_WINDOW * multiple for multiple in (1, 2, 4, 8))]
    position_ids = torch.tensor(positions) - 1
    rows = [
        (f"`{rule}`", *(f"{t:.4f}" for t in logit_scale(rule, position_ids, _SCALE_WINDOW).tolist()))
        for rule in ("eabf", "native")
    ]
    return _table((f"t(i), c = {_SCALE_WINDOW:,}", *(f"i = {position:,}" for position in positions)), rows)


def python_api() -> str:
    """One entry for each name that the package exports; the site puts the docstring there."""
    return "\n\n".join(f"::: eabf_cli.core.{module}.{name}" for name, module in _EXPORTS.items())


def benchmark_table() -> str:
    """The table of the benchmarks' kept results."""
    script = REPOSITORY / "benchmarks" / "table.py"
    return subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout.strip()


def rope_runtimes_table() -> str:
    """What each piece of software makes of a stock `rope_scaling`: a column for each method."""
    forms = ("linear", "yarn", "ntk-by-parts", "dynamic")
    rows = [
        (row.name, row.evidence, *(RUNTIMES[form][index].applies for form in forms))
        for index, row in enumerate(RUNTIMES[forms[0]])
    ]
    return _table(("runtime", "how that is known", *(f"`{form}`" for form in forms)), rows)


def result_block() -> str:
    """The measured table of the demo run, with what it was run on; from docs/results/."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    caption = (
        f"`{result['model']}` with method `{result['method']}`, window "
        f"{result['original_max_position_embeddings']:,} to {result['max_position_embeddings']:,}: "
        f"{result['num_samples']} samples, {result['num_steps']} steps, seed {result['seed']}, one run. "
        f"Training took {result['train_s']:.0f} s, everything together {result['wall_s']:.0f} s and "
        f"{result['peak_memory_gib']:.1f} GiB, on the {result['device'].upper()}."
    )
    return f"{textwrap.fill(caption, 110)}\n\n```text\n{comparison_table(result)}\n```"


def _code_list(names: Iterable[str]) -> str:
    return textwrap.fill(", ".join(f"`{name}`" for name in names), 110, break_on_hyphens=False)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = tuple(header)
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "benchmarks": benchmark_table,
    "exported families": lambda: _code_list(FAMILIES),
    "methods": method_table,
    "python api": python_api,
    "result": result_block,
    **{f"runtimes {form}": partial(runtimes_table, RUNTIMES[form]) for form in ("own", "native", "base")},
    "runtimes rope": rope_runtimes_table,
    "scale values": scale_table,
    "supported model types": lambda: _code_list(SUPPORTED_MODEL_TYPES),
    "theta values": theta_table,
}


def fill_blocks(text: str) -> str:
    """A page with its marked blocks written anew.

    Raises:
        KeyError: a block that `BLOCKS` does not have.
    """
    return re.sub(
        r"<!-- begin (?P<name>[\w ]+) -->\n.*?<!-- end (?P=name) -->",
        lambda block: f"<!-- begin {block['name']} -->\n{BLOCKS[block['name']]()}\n<!-- end {block['name']} -->",
        text,
        flags=re.DOTALL,
    )


def render_pages() -> dict[Path, str]:
    """What every page should hold, by its path."""
    pages = {
        path: fill_blocks(path.read_text(encoding="utf-8"))
        for path in (*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"))
    }
    return pages | {CLI_PAGE: cli_reference()}


if __name__ == "__main__":
    for page, content in render_pages().items():
        page.write_text(content, encoding="utf-8")
