"""The card's section on loading: the same checkpoint in transformers, in this package and in a server."""

from __future__ import annotations


def usage_section(model: str, *, needs_code: bool, window: int) -> str:
    """Commands that load a checkpoint.

    Args:
        model: Hub id or path that they name.
        needs_code: the checkpoint is loaded through the code beside it.
        window: of the extended model, in tokens. A server may work out another from the configuration.
    """
    trust = ", trust_remote_code=True" if needs_code else ""
    serve = " --trust-remote-code" if needs_code else ""
    return f"""## Use

With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model}"{trust})
model = AutoModelForCausalLM.from_pretrained("{model}"{trust})
```

With `eabf-cli`{", which brings the same code and needs no trust in this copy" if needs_code else ""}:

```python
from eabf_cli import load_model, load_tokenizer

model, tokenizer = load_model("{model}"), load_tokenizer("{model}")
```

With vLLM:

```sh
vllm serve {model}{serve} --max-model-len {window}
```"""
