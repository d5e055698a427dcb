"""`eabf_cli.modeling_eabf`: the scale, the configuration on disk and the models, against float64 formulas."""

from __future__ import annotations

import ast
import inspect
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from eabf_cli import modeling_eabf
from eabf_cli.modeling_eabf import FAMILIES, EABFLlamaConfig, exported_class_names, logit_scale

WINDOW = 16
SCALING = {
    "rope_type": "eabf",
    "type": "eabf",
    "factor": 4.0,
    "original_max_position_embeddings": WINDOW,
    "unscaled_layers": [0, 1],
    "original_rope_theta": 10_000.0,
    "format": 1,
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4 * WINDOW,
    "initializer_range": 0.3,  # large enough for attention far from uniform
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXTRA = {"mistral": {"sliding_window": None}, "granite": {"attention_multiplier": 0.35}}
RELEASED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **{key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "rope_scaling": {"factor": 4.0, "type": "eabf"},
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
}


@pytest.fixture(scope="module", autouse=True)
def _modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Code that comes with a checkpoint is cached in a folder of this test run."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("hf_modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", list(sys.path))
        yield


def build_config(family: str = "llama", **fields: Any) -> Any:
    known = {**SIZES, **EXTRA.get(family, {}), "rope_theta": 500_000.0, "rope_scaling": SCALING}
    return FAMILIES[family].config(**{**known, **fields})


def build_model(family: str = "llama", seed: int = 0, **fields: Any) -> Any:
    torch.manual_seed(seed)
    return FAMILIES[family].causal_lm(build_config(family, **fields)).eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def expected_scale(rope_type: str, position: int, window: int) -> float:
    """The formulas of the paper and of transformers' attention temperature, in double precision."""
    if rope_type == "native":
        return 1.0 + math.log(1 + position // window) / math.log(window)
    paper_position = position + 1
    return 1.0 if paper_position <= window else math.log(paper_position) / math.log(window)


# ---- The scale -----------------------------------------------------------------------------------


@given(
    rope_type=st.sampled_from(["eabf", "logn", "native"]),
    position=st.integers(0, 2**24 - 2),
    window=st.integers(2, 2**20),
)
def test_scale_is_the_formula(rope_type: str, position: int, window: int) -> None:
    scale = logit_scale(rope_type, torch.tensor([position]), window)
    assert scale.dtype == torch.float32
    assert scale.item() == pytest.approx(expected_scale(rope_type, position, window), rel=5e-7)
    assert scale.item() >= 1


@pytest.mark.parametrize("window", [2, 16, 4096, 131_072, 1_000_003])
def test_scale_changes_nothing_up_to_the_window(window: int) -> None:
    around = torch.tensor([0, 1, window // 2, window - 1, window, 2 * window])
    scale = logit_scale("eabf", around, window)
    assert (scale[around < window] == 1).all()  # the paper's i = c is position c - 1
    assert (scale[around > window] > 1).all()
    # Just beyond a huge window the scale exceeds 1 by less than float32 shows, but is never below 1.
    assert scale[4] >= 1


def test_scale_has_the_published_values_and_keeps_the_shape() -> None:
    positions = torch.tensor([[4096, 8192], [16_384, 32_768]]) - 1
    expected = torch.tensor([[1.0, 1.0833], [1.1667, 1.25]])
    torch.testing.assert_close(logit_scale("eabf", positions, 4096), expected, atol=5e-5, rtol=0)


def test_scale_is_float32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        scale = logit_scale("eabf", torch.tensor([12_345], dtype=torch.int32), 4096)
    finally:
        torch.set_default_dtype(torch.float32)
    assert scale.dtype == torch.float32
    assert scale.item() == pytest.approx(math.log(12_346) / math.log(4096), rel=1e-6)


def test_scale_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="'yarn' has no logit scale"):
        logit_scale("yarn", torch.arange(3), 4096)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        logit_scale("eabf", torch.arange(3), 1)


# ---- Importing changes nothing -------------------------------------------------------------------


def test_importing_and_building_change_nothing_global() -> None:
    script = """
    import torch
    from transformers import CONFIG_MAPPING, MODEL_MAPPING, LlamaConfig, LlamaForCausalLM
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama import modeling_llama as llama

    def snapshot():
        registries = (ROPE_INIT_FUNCTIONS, ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS,
                      CONFIG_MAPPING, MODEL_MAPPING)
        functions = (llama.apply_rotary_pos_emb, llama.eager_attention_forward, llama.LlamaAttention,
                     llama.LlamaAttention.forward, llama.LlamaModel.forward, llama.LlamaForCausalLM.forward)
        return [sorted(map(str, registry)) for registry in registries], [id(f) for f in functions]

    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16,
                 num_hidden_layers=3, num_attention_heads=2)
    stock = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    ids = torch.arange(3, 30)[None]
    logits, before = stock(ids).logits, snapshot()

    from eabf_cli.modeling_eabf import EABFLlamaConfig, EABFLlamaForCausalLM
    scaling = dict(rope_type="eabf", factor=4, original_max_position_embeddings=4, unscaled_layers=[0, 1])
    EABFLlamaForCausalLM(EABFLlamaConfig(**sizes, rope_theta=5e5, rope_scaling=scaling))(ids)
    assert snapshot() == before
    assert torch.equal(stock(ids).logits, logits)
    assert {type(layer.self_attn) for layer in stock.model.layers} == {llama.LlamaAttention}
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(modeling_eabf.__file__).parents[1],
    )
    assert run.returncode == 0, run.stderr


# ---- Configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_config_on_disk(family: str, tmp_path: Path) -> None:
    build_config(family).save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert on_disk["model_type"] == f"eabf_{family}"
    assert on_disk["rope_theta"] == 500_000.0
    assert on_disk["rope_scaling"] == SCALING
    assert on_disk["max_position_embeddings"] == 4 * WINDOW
    assert on_disk["auto_map"] == exported_class_names(family)["auto_map"]
    assert "rope_parameters" not in on_disk
    assert "eabf_scaling" not in on_disk
    assert (tmp_path / "modeling_eabf.py").read_bytes() == Path(modeling_eabf.__file__).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_config_reads_back_what_it_wrote(family: str, tmp_path: Path) -> None:
    config = build_config(family, rope_scaling={**SCALING, "rope_type": "logn", "type": "logn"})
    first = config.to_dict()
    config.save_pretrained(tmp_path / "once")
    once = FAMILIES[family].config.from_pretrained(tmp_path / "once")
    once.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "once/config.json").read_text() == (tmp_path / "twice/config.json").read_text()
    assert FAMILIES[family].config.from_pretrained(tmp_path / "twice").to_dict() == {
        **first,
        **{key: once.to_dict()[key] for key in ("_name_or_path",) if key in once.to_dict()},
    }


def test_config_reads_the_rope_parameters_form_alone() -> None:
    fields = {**SIZES, "rope_parameters": {**SCALING, "rope_theta": 123_456.0}}
    output = EABFLlamaConfig(**fields).to_dict()
    assert output["rope_theta"] == 123_456.0
    assert output["rope_scaling"] == SCALING
    assert "rope_parameters" not in output


def test_config_prefers_rope_scaling_to_the_rope_parameters_of_the_base_model() -> None:
    base = {"rope_type": "default", "rope_theta": 10_000.0}
    output = build_config(rope_parameters=base).to_dict()
    assert (output["rope_theta"], output["rope_scaling"]) == (500_000.0, SCALING)


def test_config_does_not_touch_the_caller_s_dictionary() -> None:
    scaling = {**SCALING, "unscaled_layers": [1, 0], "factor": 4}
    before = json.dumps(scaling)
    build_config(rope_scaling=scaling)
    assert json.dumps(scaling) == before


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "eabf", "factor": 4}},
        {"rope_scaling": {"type": "eabf", "factor": 4.0}, "rope_theta": 10_000.0},
        {"rope_parameters": {"type": "eabf", "rope_type": "eabf", "factor": 4.0, "rope_theta": 10_000.0}},
    ],
)
def test_released_form_is_completed_as_the_released_code_ran(rope: dict[str, Any]) -> None:
    stripped = {key: value for key, value in RELEASED.items() if key != "rope_scaling"}
    output = EABFLlamaConfig(**stripped, **rope).to_dict()
    assert output["model_type"] == "eabf_llama"
    assert output["rope_theta"] == 500_000.0
    assert output["max_position_embeddings"] == 16_384
    assert output["rope_scaling"] == {
        **SCALING,
        "original_max_position_embeddings": 4096,
        "unscaled_layers": [],
    }
    assert EABFLlamaConfig(**output).to_dict() == output


def test_released_form_scales_every_layer() -> None:
    model = FAMILIES["llama"].model(EABFLlamaConfig(**RELEASED))
    assert [type(layer.self_attn).__name__ for layer in model.layers] == ["EABFLlamaAttention"] * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"rope_theta": "paper"}, "rope_theta must be a number"),
        ({"rope_theta": -1.0}, "rope_theta must be a number"),
        ({"rope_scaling": None}, "needs `rope_scaling`"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default"}}, "needs `rope_scaling`"),
        ({"rope_scaling": {**SCALING, "rope_type": "yarn"}}, "needs `rope_scaling`"),
        ({"rope_scaling": {**SCALING, "rope_theta": 1e6}}, "500000.0 at the top and 1000000.0"),
        ({"rope_scaling": {**SCALING, "format": 2}}, "format 2, this modeling_eabf.py reads up to 1"),
        ({"rope_scaling": {**SCALING, "format": "1"}}, "format '1'"),
        ({"rope_scaling": {**SCALING, "factor": 1.0}}, "factor must be a number greater than 1, got 1.0"),
        ({"rope_scaling": {**SCALING, "factor": -4}}, "got -4"),
        ({"rope_scaling": {**SCALING, "factor": "four"}}, "got 'four'"),
        ({"rope_scaling": {**SCALING, "factor": math.inf}}, "got inf"),
        ({"rope_scaling": {**SCALING, "factor": math.nan}}, "got nan"),
        ({"rope_scaling": {**SCALING, "original_max_position_embeddings": 1}}, "at least 2, got 1"),
        ({"rope_scaling": {**SCALING, "original_max_position_embeddings": None}}, "at least 2, got None"),
        ({"rope_scaling": {**SCALING, "original_max_position_embeddings": 16.5}}, "at least 2, got 16.5"),
        ({"rope_scaling": {**SCALING, "unscaled_layers": [0, 4]}}, r"\[4\] do not exist"),
        ({"rope_scaling": {**SCALING, "unscaled_layers": [-1]}}, r"\[-1\] do not exist"),
        ({"rope_scaling": {**SCALING, "unscaled_layers": ["0"]}}, "list of layer numbers"),
        ({"rope_scaling": {**SCALING, "unscaled_layers": [True]}}, "list of layer numbers"),
        ({"rope_scaling": {**SCALING, "unscaled_layers": None}}, "list of layer numbers"),
        ({"rope_scaling": {**SCALING, "original_rope_theta": "x"}}, "original_rope_theta must be a number"),
        ({"rope_scaling": {"type": "eabf"}}, "factor must be a number greater than 1, got None"),
        (
            {"rope_scaling": {"type": "eabf", "factor": 4.0}, "max_position_embeddings": None},
            "max_position_embeddings must be a number of tokens",
        ),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(**fields)


def test_config_cannot_be_built_from_nothing() -> None:
    with pytest.raises(ValueError, match="EABFLlamaConfig needs `rope_scaling`"):
        EABFLlamaConfig()


# ---- Which layers --------------------------------------------------------------------------------


def scaled_layers(model: Any) -> list[int]:
    layers = model.model.layers
    return [i for i, layer in enumerate(layers) if type(layer.self_attn).__name__.startswith("EABF")]


@pytest.mark.parametrize("family", FAMILIES)
def test_unscaled_layers_keep_the_family_s_attention(family: str) -> None:
    # SmolLM3 has no RoPE in each fourth layer.
    assert scaled_layers(build_model(family)) == ([2] if family == "smollm3" else [2, 3])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3"])
def test_sliding_window_layers_stay_unscaled(family: str) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    windows = {"use_sliding_window": True, "sliding_window": 8, "layer_types": kinds, "max_window_layers": 0}
    scaling = {**SCALING, "unscaled_layers": []}
    assert scaled_layers(build_model(family, **windows, rope_scaling=scaling)) == [0, 2]


def test_a_model_without_a_layer_to_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no layer to scale: .*sliding_window=4096"):
        build_model("mistral", sliding_window=4096)
    with pytest.raises(ValueError, match=r"no layer to scale: .*unscaled_layers=\[0, 1, 2, 3\]"):
        build_model(rope_scaling={**SCALING, "unscaled_layers": [3, 2, 1, 0]})


# ---- Outputs against a loop in double precision --------------------------------------------------


def rotated(vector: torch.Tensor, position: int, rope_theta: float) -> torch.Tensor:
    """RoPE of one head's vector: dimensions k and k + d/2 turn by position * theta^(-2k/d)."""
    half = vector.shape[-1] // 2
    result = vector.clone()
    for k in range(half):
        angle = position * rope_theta ** (-2 * k / vector.shape[-1])
        x, y = vector[k].item(), vector[k + half].item()
        result[k] = x * math.cos(angle) - y * math.sin(angle)
        result[k + half] = x * math.sin(angle) + y * math.cos(angle)
    return result


def looped_attention(attention: Any, hidden: torch.Tensor, scale: list[float]) -> tuple[Any, Any]:
    """Causal attention of one row `hidden` (query, hidden), head by head and query by query, in float64."""

    def heads(projection: Any, norm: Any) -> torch.Tensor:
        weight = projection.weight.double()
        bias = 0.0 if projection.bias is None else projection.bias.double()
        split = (hidden.double() @ weight.T + bias).view(len(hidden), -1, attention.head_dim)
        if norm is None:
            return split
        mean_square = split.pow(2).mean(-1, keepdim=True)
        return split / (mean_square + norm.variance_epsilon).sqrt() * norm.weight.double()

    query = heads(attention.q_proj, getattr(attention, "q_norm", None))
    key = heads(attention.k_proj, getattr(attention, "k_norm", None))
    value = heads(attention.v_proj, None)
    num_queries, num_heads, _ = query.shape
    output = torch.zeros_like(query)
    weights = torch.zeros(num_heads, num_queries, num_queries, dtype=torch.float64)
    for head in range(num_heads):
        shared = head * key.shape[1] // num_heads
        keys = [rotated(key[j, shared], j, 500_000.0) for j in range(num_queries)]
        for i in range(num_queries):
            turned = rotated(query[i, head], i, 500_000.0)
            logits = torch.stack([scale[i] * attention.scaling * (turned @ keys[j]) for j in range(i + 1)])
            weights[head, i, : i + 1] = logits.softmax(0)
            output[i, head] = weights[head, i, : i + 1] @ value[: i + 1, shared]
    return output.flatten(1) @ attention.o_proj.weight.double().T, weights


@pytest.mark.parametrize("rope_type", ["eabf", "native"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attention_is_the_formula(family: str, rope_type: str) -> None:
    model = build_model(family, rope_scaling={**SCALING, "rope_type": rope_type, "type": rope_type})
    attention = model.model.layers[2].self_attn
    if family == "qwen3":  # fresh norms are all ones, which would hide an omitted weight
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.copy_(torch.linspace(0.5, 2, attention.head_dim))
    seen: dict[str, Any] = {}
    attention.register_forward_hook(
        lambda _module, _args, kwargs, output: seen.update(hidden=kwargs["hidden_states"], output=output[0]),
        with_kwargs=True,
    )
    length = 2 * WINDOW + 3
    model.set_attn_implementation("eager")
    attentions = model(random_ids(1, length), output_attentions=True).attentions

    scale = [expected_scale(rope_type, position, WINDOW) for position in range(length)]
    output, weights = looped_attention(attention, seen["hidden"][0], scale)
    assert max_difference(seen["output"][0].double(), output) < 1e-5
    assert max_difference(attentions[2][0].double(), weights) < 1e-5
    # The loop can tell the scaled attention from the unscaled one.
    unscaled, _ = looped_attention(attention, seen["hidden"][0], [1.0] * length)
    assert max_difference(seen["output"][0].double(), unscaled) > 1e-3


@pytest.mark.parametrize("rope_type", ["eabf", "logn", "native"])
@torch.no_grad()
def test_inside_the_window_it_is_the_stock_model_with_the_new_base(rope_type: str) -> None:
    from transformers import LlamaConfig

    model = build_model(rope_scaling={**SCALING, "rope_type": rope_type, "type": rope_type})
    stock = LlamaForCausalLM(LlamaConfig(**SIZES, rope_theta=500_000.0)).eval()
    stock.load_state_dict(model.state_dict())
    ids = random_ids(2, 2 * WINDOW)
    scaled_logits, stock_logits = model(ids).logits, stock(ids).logits
    assert torch.equal(scaled_logits[:, :WINDOW], stock_logits[:, :WINDOW])
    assert max_difference(scaled_logits[:, WINDOW:], stock_logits[:, WINDOW:]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sdpa_agrees_with_eager(family: str) -> None:
    model, ids = build_model(family), random_ids(2, 40)
    logits = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        logits[implementation] = model(ids).logits
    assert max_difference(logits["sdpa"], logits["eager"]) < 1e-4


@torch.no_grad()
def test_bfloat16_model_multiplies_by_a_scale_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    queries: list[torch.Tensor] = []
    kernel = modeling_llama.eager_attention_forward

    def spy(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        queries.append(query)
        # Flash attention tells packed rows apart by them, as in the family's own attention.
        assert kwargs["position_ids"] is positions
        return kernel(module, query, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", spy)
    model = build_model(attn_implementation="eager", num_hidden_layers=3).bfloat16()
    positions = torch.arange(0, 6000, 50)[None]
    ids = random_ids(*positions.shape)
    model(ids, position_ids=positions)
    scaled = queries[2]
    model.model.layers[2].self_attn.__class__ = modeling_llama.LlamaAttention
    model(ids, position_ids=positions)
    plain = queries[5]
    expected = [expected_scale("eabf", int(position), WINDOW) for position in positions[0]]
    factor = torch.tensor(expected, dtype=torch.float64).to(torch.bfloat16)
    assert scaled.dtype == torch.bfloat16
    assert torch.equal(scaled, plain * factor[None, None, :, None])


# ---- Positions: caches, padding, packing ---------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generation_across_the_window_with_and_without_a_cache(family: str) -> None:
    model, prompt = build_model(family), random_ids(1, WINDOW - 4)
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    expected = model.generate(prompt, use_cache=False, **options)
    for cache in ("dynamic", "static"):
        got = model.generate(prompt, cache_implementation=cache, **options)
        assert torch.equal(got.sequences, expected.sequences)
        assert max_difference(torch.stack(got.logits), torch.stack(expected.logits)) < 1e-4
    assert expected.sequences.shape[1] == WINDOW + 8


@torch.no_grad()
def test_chunked_prefill() -> None:
    model, ids = build_model(), random_ids(2, 40)
    expected = model(ids).logits
    cache, chunks = None, []
    for chunk in ids.split([10, 1, 9, 20], dim=1):
        output = model(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chunks.append(output.logits)
    assert max_difference(torch.cat(chunks, dim=1), expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_left_padding_counts_no_pads(family: str) -> None:
    model, ids = build_model(family), random_ids(1, 30)
    pads = torch.zeros(1, 9, dtype=torch.long)
    padded = torch.cat([pads, ids], dim=1)
    mask = torch.cat([pads, torch.ones_like(ids)], dim=1)
    expected = model(ids).logits
    assert max_difference(model(padded, attention_mask=mask).logits[:, 9:], expected) < 1e-4
    # In two parts through a cache: the mask covers cached and new tokens.
    first = model(padded[:, :28], attention_mask=mask[:, :28], use_cache=True)
    rest = model(padded[:, 28:], attention_mask=mask, past_key_values=first.past_key_values)
    assert max_difference(rest.logits, expected[:, 19:]) < 1e-4


@torch.no_grad()
def test_right_padding_and_embeddings_as_input() -> None:
    model, ids = build_model(), random_ids(1, 30)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    mask = (torch.arange(35) < 30).long()[None]
    embeddings = model.get_input_embeddings()(padded)
    got = model(inputs_embeds=embeddings, attention_mask=mask).logits
    assert max_difference(got[:, :30], model(ids).logits) < 1e-4


def test_a_mask_too_short_for_its_cache_is_refused() -> None:
    model, ids = build_model(), random_ids(1, 20)
    cache = model(ids[:, :10], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="10 columns for 10 cached and 10 new tokens"):
        model(ids[:, 10:], attention_mask=torch.ones(1, 10), past_key_values=cache)


@torch.no_grad()
def test_packed_rows_restart_their_positions() -> None:
    model, ids = build_model(), random_ids(1, 50)
    packed = model(ids, position_ids=torch.cat([torch.arange(30), torch.arange(20)])[None], use_cache=False).logits
    assert max_difference(packed[:, :30], model(ids[:, :30]).logits) < 1e-4
    assert max_difference(packed[:, 30:], model(ids[:, 30:]).logits) < 1e-4


def test_attention_without_position_ids_is_an_error() -> None:
    attention = build_model().model.layers[3].self_attn
    rotation = (torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
    with pytest.raises(ValueError, match="layer 3 got no position_ids"):
        attention(torch.zeros(1, 4, 32), rotation, None)


# ---- Training and compilation --------------------------------------------------------------------


def gradients(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, ids = build_model().train(), random_ids(2, 40)
    plain = gradients(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for checkpointed, expected in zip(gradients(model, ids), plain, strict=True):
        torch.testing.assert_close(checkpointed, expected)
    assert all(gradient.abs().max() > 0 for gradient in plain)


@pytest.mark.slow
@torch.no_grad()
def test_compiles_into_one_graph() -> None:
    model, ids = build_model(num_hidden_layers=3), random_ids(1, 40)
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    positions = torch.arange(40)[None]
    got = compiled(ids, position_ids=positions, use_cache=False).last_hidden_state
    assert max_difference(got, model.model(ids).last_hidden_state) < 1e-5


def test_attention_source_can_be_rewritten_by_a_server() -> None:
    forward = modeling_eabf._ScaledAttention.forward
    assert forward.__code__.co_freevars == ()
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for projection in ("q_proj", "k_proj", "v_proj"):
        assert calls.count(f"self.{projection}(hidden_states)") == 1
    assert not any(call.startswith("super(") for call in calls)
    kernels = [call for call in calls if call.startswith("attention_interface(")]
    assert len(kernels) == 1
    assert "scaling=self.scaling" in kernels[0]
    assigned = [ast.unparse(node.value) for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    assert "ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]" in assigned


# ---- Checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_checkpoint_round_trips_twice(family: str, tmp_path: Path) -> None:
    model, ids = build_model(family), random_ids(1, 40)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "first")
    once = AutoModelForCausalLM.from_pretrained(tmp_path / "first", trust_remote_code=True)
    assert type(once).__module__.startswith("transformers_modules.")
    assert torch.equal(once(ids).logits, expected)
    once.save_pretrained(tmp_path / "second")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "second", trust_remote_code=True)
    assert torch.equal(twice(ids).logits, expected)
    assert scaled_layers(twice) == scaled_layers(model)
    for name in ("config.json", "modeling_eabf.py"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    written = json.loads((tmp_path / "second/config.json").read_text())
    names = exported_class_names(family)
    assert {key: written[key] for key in names} == names


@torch.no_grad()
def test_base_model_loads_by_itself(tmp_path: Path) -> None:
    model, ids = build_model(), random_ids(1, 40)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_checkpoint_fails_loudly_without_its_code(tmp_path: Path) -> None:
    build_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    with pytest.raises(KeyError, match="eabf"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_checkpoint_whose_theta_was_dropped_fails_loudly(tmp_path: Path) -> None:
    build_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["rope_theta"]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="rope_theta is missing"):
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = build_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


# ---- Names ---------------------------------------------------------------------------------------


def test_exported_class_names() -> None:
    assert exported_class_names("llama") == {
        "model_type": "eabf_llama",
        "architectures": ["EABFLlamaForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_eabf.EABFLlamaConfig",
            "AutoModel": "modeling_eabf.EABFLlamaModel",
            "AutoModelForCausalLM": "modeling_eabf.EABFLlamaForCausalLM",
        },
    }
    with pytest.raises(KeyError, match=r"'gemma3'; known: llama, mistral"):
        exported_class_names("gemma3")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_exported_name_exists_in_the_file(family: str) -> None:
    for target in exported_class_names(family)["auto_map"].values():
        module, name = target.split(".")
        assert module == "modeling_eabf"
        assert hasattr(modeling_eabf, name)
