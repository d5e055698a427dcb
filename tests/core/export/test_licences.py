"""Publishing a changed copy of a model whose licence sets conditions needs the user's word."""

from __future__ import annotations

import pytest

from eabf_cli.core.errors import HubError
from eabf_cli.core.export.licences import check_licence


@pytest.mark.parametrize(
    ("licence", "base_model", "named"),
    [
        ("llama2", "meta-llama/Llama-2-7b-hf", "Llama 2 Community License"),
        ("llama3", "meta-llama/Meta-Llama-3-8B", "Built with Meta Llama 3"),
        ("llama3.1", "meta-llama/Llama-3.1-8B", "Built with Llama"),
        ("llama3.3", None, "Built with Llama"),
        ("llama4", None, "Built with Llama"),
        ("gemma", "google/gemma-3-1b-pt", "Gemma Terms of Use"),
        ("cc-by-nc-4.0", "somebody/model", "non-commercial"),
        ("cc-by-nc-sa-4.0", "somebody/model", "non-commercial"),
        ("cc-by-nc-nd-4.0", "somebody/model", "may not be shared at all"),
        ("cc-by-nd-4.0", "somebody/model", "may not be shared at all"),
        ("bigscience-bloom-rail-1.0", "bigscience/bloom", "use restrictions"),
        ("creativeml-openrail-m", "somebody/model", "use restrictions"),
        ("other", "somebody/model", "does not know (other)"),
        ("house-rules-1.0", "somebody/model", "does not know (house-rules-1.0)"),
        # Without a licence in the card, the family's name tells.
        (None, "NousResearch/Llama-2-7b-chat-hf", "by its name"),
        (None, "Arist12/eabf-llama2-7b-chat-1k", "Llama 2 Community License"),
        ("unknown", "/models/llama-3.2-1b", "Built with Llama"),
        (None, "unsloth/gemma-2-2b", "Gemma Terms of Use"),
    ],
)
def test_conditions_are_named_and_need_to_be_accepted(licence: str | None, base_model: str | None, named: str) -> None:
    with pytest.raises(HubError) as caught:
        check_licence(licence, base_model, accepted=False)
    assert named in str(caught.value)
    assert "--accept-license" in str(caught.value)
    assert base_model is None or base_model in str(caught.value)
    (warning,) = check_licence(licence, base_model, accepted=True)
    assert named in warning


@pytest.mark.parametrize(
    "licence", ["apache-2.0", "Apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "gpl-3.0"]
)
def test_open_licences_pass_in_silence(licence: str) -> None:
    assert check_licence(licence, "somebody/model", accepted=False) == []


@pytest.mark.parametrize(
    "base_model",
    [
        "openlm-research/open_llama_3b_v2",
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "HuggingFaceTB/SmolLM2-135M",
        "google/gemma-4-e2b",
        "demo",
        None,
    ],
)
def test_a_licence_that_nobody_knows_is_a_warning(base_model: str | None) -> None:
    (warning,) = check_licence(None, base_model, accepted=False)
    assert "not known" in warning
