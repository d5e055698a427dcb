"""Entropy-Aware ABF: extend a RoPE language model's context window with 100 samples.

Importing this package changes nothing in transformers and loads neither it nor torch: names are
resolved when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "EabfError": "errors",
    "METHODS": "methods",
    "RopeScalingConfig": "scaling_config",
    "apply_eabf": "patching",
    "apply_method": "patching",
    "describe_patch": "patching",
    "remove_method": "patching",
    "load_model": "checkpoint",
    "load_tokenizer": "checkpoint",
    "EntropyConfig": "entropy.settings",
    "compute_attention_entropy": "entropy.run",
    "FinetuneConfig": "finetune.plan",
    "finetune": "finetune.run",
    "ExportConfig": "export.settings",
    "HubTarget": "export.hub_target",
    "export_checkpoint": "export.exporting",
    "SummarizeConfig": "summarize.settings",
    "summarize": "summarize.run",
    "EvalConfig": "evals.settings",
    "evaluate": "evaluation",
    "EvalRunConfig": "evals.settings",
    "run_evaluation": "evals.run",
    "CompareConfig": "evals.compare_settings",
    "compare": "evals.compare",
    "VerdictConfig": "evals.verdict_settings",
    "verdict": "evals.verdict",
    "SuiteConfig": "evals.suites",
    "run_suites": "evals.suites",
    "PatchConfig": "patch_checkpoint",
    "patch_checkpoint": "patch_checkpoint",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.core.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
