"""The cards of the demo model and its data: what they are, where they come from, and measured figures."""

from dataclasses import dataclass
from pathlib import Path

from demo_corpus import SOURCES

from eabf_cli.core.checkpoint import load_model, load_tokenizer
from eabf_cli.core.evaluation import EvalConfig, evaluate
from eabf_cli.core.methods import METHODS
from eabf_cli.core.patching import apply_method, remove_method
from eabf_cli.core.scaling_config import RopeScalingConfig

LENGTHS = (256, 512, 1024, 2048)
FACTOR = 4.0


@dataclass(frozen=True)
class Figures:
    """One row of the table: perplexity and passkey accuracy (%) at each of `LENGTHS`."""

    name: str
    perplexity: tuple[float, ...]
    passkey: tuple[float, ...]


def measure(model_dir: Path, num_passkey_trials: int = 25) -> list[Figures]:
    """The model as it stands, then under each method of the table, untrained (factor 4), in float32."""
    model = load_model(str(model_dir), dtype="float32", device="cpu")
    tokenizer = load_tokenizer(str(model_dir))
    config = EvalConfig(tasks=("perplexity", "passkey"), lengths=LENGTHS, num_passkey_trials=num_passkey_trials)
    rows = [_figures("unpatched", evaluate(model, tokenizer, config))]
    for name in METHODS:
        apply_method(model, RopeScalingConfig(method=name, factor=FACTOR))
        rows.append(_figures(name, evaluate(model, tokenizer, config)))
        remove_method(model)
    return rows


def _figures(name: str, result: dict) -> Figures:
    perplexity = {entry["length"]: entry["perplexity"] for entry in result["perplexity"]}
    correct = dict.fromkeys(LENGTHS, 0.0)
    trials = dict.fromkeys(LENGTHS, 0)
    for entry in result["passkey"]:
        correct[entry["length"]] += entry["accuracy"] * entry["num_trials"]
        trials[entry["length"]] += entry["num_trials"]
    return Figures(
        name,
        tuple(perplexity[length] for length in LENGTHS),
        tuple(100 * correct[length] / trials[length] for length in LENGTHS),
    )


def figures_table(rows: list[Figures]) -> str:
    """The figures as a Markdown table."""
    lengths = [f"{length:,}" for length in LENGTHS]
    header = ["method", *(f"ppl {text}" for text in lengths), *(f"passkey {text}" for text in lengths)]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        lines.append([row.name, *(f"{p:.1f}" for p in row.perplexity), *(f"{k:.0f} %" for k in row.passkey)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sources_table() -> str:
    """The corpus as a Markdown table, from the table of sources."""
    lines = ["| text | Debian package | licence |", "| --- | --- | --- |"]
    for source in SOURCES:
        lines.append(f"| {source.name} | {', '.join(source.packages)} | {source.licence} |")
    return "\n".join(lines)


def model_card(history: str, rows: list[Figures]) -> str:
    """The card of `eabf-tiny`. `history` says in one or two sentences how the weights came about."""
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# eabf-tiny

The bundled demo model of `eabf`: a Llama of 5.4 million parameters (hidden size 256, 6 layers, 4 heads of 64,
2 key/value heads, MLP 688, tied embeddings) with a window of 512 tokens, `rope_theta` 10,000 and a byte-level
BPE vocabulary of 4,096. It exists so that the whole tool runs for real, offline, on two CPU cores: it is good
inside its window, useless beyond it, and shows what each method of extension does about that. It is far too
small to be useful for anything else, and may write nonsense.

Every text it sees must begin with the BOS token `<s>`; its tokenizer does not add one by itself.

## Figures

Perplexity of the last 256 tokens of a window (128 of a window of 256) of 16 held-out documents of
`demo-long`, and accuracy on the standard passkey prompt (25 prompts a length, five depths, greedy, all digits
right). The methods are applied with factor {FACTOR:g} and nothing is trained.

{figures_table(rows)}

## Training

{history}

The script's rows of 513 tokens begin with BOS: 42 % plain text, 30 % facts planted in text and asked for (the
standard passkey prompt, its keyed form, and the templates marked `train` in `eabf_cli/core/needles.py`), 28 %
spans that occur twice at any distance within the window. The templates marked `heldout` are in no row. The
last 5 % of each source is held out. 0.1 % of the runs of 13 words in the held-out documents of `demo-long`
occur in the training text all the same: the Bible repeats itself, and the dictionary quotes it. Step by step:
`scripts/train_demo_model.py`.

## Sources and licences

{sources_table()}

Austen's novels and the King James Bible are public domain; the other texts are free documentation under the
licences named, and no text of theirs is in this folder. The weights are released under Apache-2.0.
"""


def data_card() -> str:
    """The card of `demo-long`."""
    return """---
license: apache-2.0
language: en
---
# demo-long

Long text for extending and measuring `eabf-tiny`: JSON Lines with one `{"text": ...}` a line.

- `train.jsonl`: 240 samples of 1,900 to 2,047 tokens (of `eabf-tiny`'s tokenizer, BOS not counted), all
  different passages. About two thirds are plain text. In the others, later parts depend on earlier ones: facts
  are stated (in 2,000 tokens, 3 to 5 kinds of fact, several of them for more than one person) and asked for
  further on, half of the time at the very end; or passages and series of random words occur a second time.
  Every fifth of the fact samples has a monotonous refrain in place of the text.
- `heldout.jsonl`: 33 documents of at least 4,350 tokens, plain text, the three sources in turns: 13 of Austen, 13 of
  the Bible, 7 of SQLite's documentation.

## What it leaves out

The wordings it asks with are the templates marked `train` in `eabf_cli/core/needles.py`. The standard passkey
prompt, its filler sentences and the templates marked `heldout`, which evaluations ask, are not in it. The
documents are the last 5 % of each source, which `eabf-tiny` was not trained on either; three of SQLite's, which repeat
pages of the training part, were left out (more than 2 % of their runs of 13 words). A sample that has 13 words in a row
in common with a document was dropped (the Bible repeats itself). A test checks the samples.

## Sources and licence

The text is Jane Austen's six novels (Debian package r-cran-janeaustenr), the King James Bible (bible-kjv) and SQLite's
documentation (sqlite3-doc), all public domain; line breaks within paragraphs, verse numbers and page furniture are
taken out. The planted sentences and the selection are this project's, under Apache-2.0. Built by
`scripts/train_demo_model.py data`; figures on a model trained with it are of use for this demo only.
"""
