"""The README.md of a checkpoint, through huggingface_hub's ModelCard."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from eabf_cli.core.checkpoint_format import MODELING_FILE
from eabf_cli.core.methods import METHODS
from eabf_cli.core.report import PatchReport

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

`{{ base_model }}`, its context window extended from {{ window }} to {{ target }} tokens
by **{{ method }}** ({{ reference }}): {{ summary }}

| | before | after |
|---|---|---|
| window (tokens) | {{ window }} | {{ target }} |
| rope_theta | {{ old_theta }} | {{ new_theta }} |

{{ scale }}

{{ results }}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH"{{ trust }})
model = AutoModelForCausalLM.from_pretrained("PATH"{{ trust }})
```

{{ who }}
Made with `eabf-cli`; `eabf_run.json` says how.
"""


def write_model_card(
    folder: Path,
    report: PatchReport,
    *,
    base_model: str,
    revision: str | None,
    results: str = "No evaluation was run on this checkpoint.",
) -> None:
    """Write the card of a checkpoint folder.

    Args:
        results: markdown with what was measured; nothing else is claimed.
    """
    needs_code = (folder / MODELING_FILE).is_file()
    entry = METHODS[report.method]
    if report.scaled_layers:
        positions = ", ".join(f"{t:.4g} at {position:,}" for position, t in report.logit_scale.items())
        exempt = ", ".join(map(str, report.unscaled_layers)) or "none"
        scale = (
            f"Attention logits of {report.num_scaled_layers} layers are scaled: {positions} (exempt layers: {exempt})."
        )
    else:
        scale = "Attention logits are not scaled by position."
    who = (
        f"The scale is applied by `{MODELING_FILE}` in this folder, hence `trust_remote_code=True`; "
        "software that does not run it refuses the model type instead of answering wrongly.\n"
        if needs_code
        else "Stock transformers loads this checkpoint; no extra code is needed.\n"
    )
    data = ModelCardData(
        # A local path means nothing to a reader on the Hub.
        base_model=base_model if revision is not None else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["long-context", "rope", "eabf", report.method],
    )
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=f"{Path(base_model).name} {report.method} x{report.factor:g}",
        base_model=base_model if revision is None else f"{base_model}@{revision}",
        method=report.method,
        reference=entry.reference,
        summary=entry.summary,
        window=f"{report.original_max_position_embeddings:,}",
        target=f"{report.max_position_embeddings:,}",
        old_theta=f"{report.original_rope_theta:,.0f}",
        new_theta=f"{report.rope_theta:,.0f}",
        scale=scale,
        results=results,
        trust=", trust_remote_code=True" if needs_code else "",
        who=who,
    )
    card.save(folder / "README.md")
