"""Checkpoints that need no code, in transformers 4.57: the same outputs, or an error.

The other interpreter is named by EABF_TRANSFORMERS_457_PYTHON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eabf_cli import load_model
from eabf_cli.core.method_request import MethodRequest
from eabf_cli.core.patch_checkpoint import PatchConfig, patch_checkpoint
from tests.tiny_llama import token_ids
from tests.transformers_457 import needs_457, run_457

pytestmark = needs_457
METHODS = ("abf", "dynamic", "linear", "ntk", "ntk-by-parts", "yarn")

SCRIPT_457 = """
import sys
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

assert transformers.__version__.startswith("4.57."), transformers.__version__
root, *names = sys.argv[1:]
ids = load_file(f"{root}/inputs.safetensors")["input_ids"]
for name in names:
    try:
        model = AutoModelForCausalLM.from_pretrained(f"{root}/{name}", dtype=torch.float32)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")
        continue
    with torch.no_grad():
        save_file({"logits": model(ids).logits}, f"{root}/{name}.safetensors")
"""


@pytest.fixture(scope="module")
def loaded(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the checkpoints with what 4.57 computed from each, and what it said."""
    root = tmp_path_factory.mktemp("stock")
    for method in (*METHODS, "native"):
        request = MethodRequest(method=method)
        patch_checkpoint(PatchConfig(model=str(tiny_llama_folder), output=root / method, request=request))
    save_file({"input_ids": token_ids()}, root / "inputs.safetensors")
    said = run_457(SCRIPT_457, root, str(root), *METHODS, "native")
    return root, said


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_457_computes_the_same_without_code(method: str, loaded: tuple[Path, str]) -> None:
    root, _ = loaded
    expected: Any = load_model(root / method, dtype="float32")(token_ids()).logits
    got = load_file(root / f"{method}.safetensors")["logits"]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_457_refuses_the_native_form(loaded: tuple[Path, str]) -> None:
    root, said = loaded
    assert not (root / "native.safetensors").exists()
    assert said.startswith("native: ValueError: ")
    assert "ministral3" in said
