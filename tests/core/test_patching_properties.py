"""What holds for a patched model of every architecture, whatever its numbers: see DESIGN.md, sections 3 and 4."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from eabf_cli.core.errors import AlreadyScaledError, InvalidConfigError, UnsupportedModelError
from eabf_cli.core.methods import METHODS
from eabf_cli.core.patching import apply_eabf, apply_method, describe_patch, remove_method
from eabf_cli.core.scaling_config import RopeScalingConfig
from tests.architectures import (
    ALREADY_SCALED_CONFIGS,
    ARCHITECTURE_CONFIGS,
    UNSCALABLE_CONFIGS,
    VARIANT_CONFIGS,
    WINDOW,
    build_tiny_config,
    build_tiny_model,
    random_tokens,
    randomize_weights,
)
from tests.reference import Extension, reference_forward
from tests.reference.family import has_rope, is_sliding
from tests.scalings import SCALED_METHODS, scaling_for

LENGTH = 5 * WINDOW // 2
TOKENS = random_tokens(LENGTH)
# Of the logits' range; float32 in another order of operations stays below 3e-6.
TOLERANCE = 2e-5

PATCHABLE = [*ARCHITECTURE_CONFIGS, *VARIANT_CONFIGS]
# One of each kind of attention: plain, fused with partial rotary, two rotaries, NoPE layers, own temperature, experts.
DIVERSE = ["llama", "phi3", "gemma3_text", "smollm3", "ministral3", "mixtral"]
# `dynamic` recomputes its frequencies from the length of each call, so keys that were cached in a shorter call are
# rotated otherwise than in one long call.
CACHEABLE_METHODS = [method for method in METHODS if method != "dynamic"]

EABF = scaling_for("eabf")

all_architectures = pytest.mark.parametrize("name", PATCHABLE)
diverse_architectures = pytest.mark.parametrize("name", DIVERSE)
all_methods = pytest.mark.parametrize("method", METHODS)


def build_patched(name: str, method: str = "eabf", **overrides: Any) -> PreTrainedModel:
    model = build_tiny_model(name, **overrides)
    apply_method(model, scaling_for(method))
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: Tensor = TOKENS, **kwargs: Any) -> Tensor:
    """`(batch, length, vocabulary)`."""
    return model(tokens, **kwargs).logits


def left_pad(row: Tensor, pads: int) -> tuple[Tensor, Tensor]:
    """The row behind `pads` padding tokens, and its attention mask, both `(1, pads + length)`."""
    padded = torch.nn.functional.pad(row, (pads, 0))
    return padded, (torch.arange(padded.shape[1]) >= pads).long()[None]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    error = (actual - expected).abs().max() / (expected.max() - expected.min())
    assert error < TOLERANCE, f"off by {error:.1e} of the range"


def assert_differs(actual: Tensor, expected: Tensor) -> None:
    error = (actual - expected).abs().max() / (expected.max() - expected.min())
    assert error > 50 * TOLERANCE, f"differs by no more than {error:.1e} of the range"


class TestApplyAndRemove:
    @all_methods
    @all_architectures
    def test_removal_restores_the_model_bit_for_bit(self, name: str, method: str) -> None:
        model = build_tiny_model(name)
        original, state, config = logits_of(model), model.state_dict().keys(), model.config.to_dict()
        apply_method(model, scaling_for(method))
        assert_differs(logits_of(model), original)
        removed = remove_method(model)
        assert removed.method == method
        assert describe_patch(model) is None
        assert torch.equal(logits_of(model), original)
        assert model.state_dict().keys() == state
        assert model.config.to_dict() == config

    def test_removal_gives_back_the_stock_numbering_of_padded_rows(self) -> None:
        model = build_tiny_model("llama")
        padded, mask = left_pad(TOKENS, 11)
        original = logits_of(model, padded, attention_mask=mask)
        apply_method(model, scaling_for("logn"))
        assert not torch.equal(logits_of(model, padded, attention_mask=mask), original)
        remove_method(model)
        assert torch.equal(logits_of(model, padded, attention_mask=mask), original)

    @all_methods
    def test_applying_twice_is_refused_and_changes_nothing(self, method: str) -> None:
        model = build_patched("llama")
        before = logits_of(model)
        with pytest.raises(AlreadyScaledError, match="remove_method"):
            apply_method(model, scaling_for(method))
        assert torch.equal(logits_of(model), before)
        assert describe_patch(model).method == "eabf"

    @pytest.mark.parametrize("name", ALREADY_SCALED_CONFIGS)
    def test_a_model_with_its_own_scale_is_refused(self, name: str) -> None:
        model = build_tiny_model(name)
        before = logits_of(model)
        with pytest.raises(AlreadyScaledError, match="rebase"):
            apply_method(model, EABF)
        assert torch.equal(logits_of(model), before)

    @all_methods
    @pytest.mark.parametrize("name", UNSCALABLE_CONFIGS)
    def test_a_model_without_a_layer_to_scale_is_refused_untouched(self, name: str, method: str) -> None:
        model = build_tiny_model(name)
        before, config = logits_of(model), model.config.to_dict()
        with pytest.raises(UnsupportedModelError, match="no layer"):
            apply_method(model, scaling_for(method))
        assert describe_patch(model) is None
        assert model.config.to_dict() == config
        assert torch.equal(logits_of(model), before)

    def test_exempting_every_layer_is_refused(self) -> None:
        with pytest.raises(UnsupportedModelError, match="unscaled_layers"):
            apply_method(build_tiny_model("gemma3_text"), scaling_for("eabf", unscaled_layers=(0, 2)))

    def test_removing_nothing_is_an_error(self) -> None:
        with pytest.raises(InvalidConfigError, match="no method"):
            remove_method(build_tiny_model("llama"))

    def test_a_method_can_follow_another(self) -> None:
        model = build_patched("llama", "yarn")
        remove_method(model)
        apply_method(model, EABF)
        assert torch.equal(logits_of(model), logits_of(build_patched("llama")))

    @all_architectures
    def test_the_report_names_scaled_sliding_and_nope_layers(self, name: str) -> None:
        config = build_tiny_config(name)
        report = apply_method(build_tiny_model(name), EABF)
        layers = range(config.num_hidden_layers)
        sliding = [layer for layer in layers if is_sliding(config, layer)]
        nope = [layer for layer in layers if not has_rope(config, layer)]
        assert list(report.sliding_layers) == sliding
        assert list(report.nope_layers) == nope
        assert list(report.scaled_layers) == [
            layer for layer in layers if layer >= 2 and layer not in sliding and layer not in nope
        ]

    def test_apply_eabf_is_the_paper(self) -> None:
        model = build_tiny_model("llama")
        apply_eabf(model)
        assert torch.equal(logits_of(model), logits_of(build_patched("llama")))

    def test_two_models_of_one_config_object_are_independent(self) -> None:
        config = build_tiny_config("llama")
        model, other = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
        assert model.config is other.config
        for each in (model, other):
            randomize_weights(each)
        before, fields = logits_of(other), config.to_dict()
        apply_method(model, EABF)
        assert torch.equal(logits_of(other), before)
        assert config.to_dict() == fields
        assert describe_patch(other) is None
        assert_differs(logits_of(model), before)

    @diverse_architectures
    def test_a_deep_copy_is_patched_and_independent(self, name: str) -> None:
        model = build_tiny_model(name)
        original = logits_of(model)
        apply_method(model, EABF)
        patched = logits_of(model)
        twin = copy.deepcopy(model)
        assert torch.equal(logits_of(twin), patched)
        remove_method(twin)
        assert torch.equal(logits_of(twin), original)
        assert torch.equal(logits_of(model), patched)

        twin = copy.deepcopy(model)
        remove_method(model)
        assert torch.equal(logits_of(model), original)
        assert torch.equal(logits_of(twin), patched)
        assert twin.save_pretrained.__self__ is twin

    def test_importing_and_patching_leave_transformers_as_it_is(self) -> None:
        script = """
            import copy, inspect, torch, transformers
            from transformers import AttentionInterface, CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
            from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
            from transformers.models.llama import modeling_llama, configuration_llama

            def look():
                classes = {
                    f"{module.__name__}.{name}": dict(vars(value)) if isinstance(value, type) else value
                    for module in (modeling_llama, configuration_llama)
                    for name, value in vars(module).items()
                    if inspect.isclass(value) or inspect.isfunction(value)
                }
                tables = [dict(table) for table in (ROPE_INIT_FUNCTIONS, AttentionInterface._global_mapping,
                                                    MASKS._global_mapping)]
                extra = [dict(CONFIG_MAPPING._extra_content), dict(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content)]
                base = dict(vars(transformers.PreTrainedModel)), dict(vars(torch.nn.Module))
                return classes, tables, extra, base

            before = look()
            import eabf_cli, eabf_cli.modeling_eabf, eabf_cli.core.patching
            assert look() == before, "import"

            from tests.architectures import build_tiny_model
            from tests.scalings import scaling_for
            model = build_tiny_model("llama")
            copy.deepcopy(model.config)  # Python itself notes on a class how to copy it, once
            before = look()
            eabf_cli.core.patching.apply_method(model, scaling_for("eabf"))
            after = look()
            assert set(after[1][1]) - set(before[1][1]) == {"eabf"}, "one kernel of ours is added"
            del after[1][1]["eabf"]
            assert after == before, "patch"
        """
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr


class TestInsideTheWindow:
    @all_architectures
    def test_the_scale_changes_nothing_bit_for_bit(self, name: str) -> None:
        scaled, unscaled = logits_of(build_patched(name, "eabf")), logits_of(build_patched(name, "abf"))
        assert torch.equal(scaled[:, :WINDOW], unscaled[:, :WINDOW])
        assert_differs(scaled[:, WINDOW:], unscaled[:, WINDOW:])

    @all_architectures
    def test_logn_leaves_the_stock_model_alone_bit_for_bit(self, name: str) -> None:
        scaled, stock = logits_of(build_patched(name, "logn")), logits_of(build_tiny_model(name))
        assert torch.equal(scaled[:, :WINDOW], stock[:, :WINDOW])
        assert_differs(scaled[:, WINDOW:], stock[:, WINDOW:])

    def test_the_first_scaled_position_is_the_one_after_the_window(self) -> None:
        scaled, unscaled = logits_of(build_patched("llama", "eabf")), logits_of(build_patched("llama", "abf"))
        assert not torch.equal(scaled[:, WINDOW], unscaled[:, WINDOW])


class TestPositions:
    """The scale follows true positions, however the tokens reach the model."""

    @pytest.mark.parametrize(
        ("name", "method"),
        [(name, "eabf") for name in PATCHABLE]
        + [(name, method) for name in ("llama", "gemma3_text") for method in CACHEABLE_METHODS if method != "eabf"],
    )
    def test_generating_across_the_window_with_and_without_cache(self, name: str, method: str) -> None:
        model = build_patched(name, method)
        prompt = TOKENS[:, : WINDOW - 4]
        cached, uncached = (
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=10,
                min_new_tokens=10,
                do_sample=False,
                use_cache=use_cache,
                output_logits=True,
                return_dict_in_generate=True,
            )
            for use_cache in (True, False)
        )
        assert cached.sequences.shape[1] == WINDOW + 6
        assert torch.equal(cached.sequences, uncached.sequences)
        assert_close(torch.stack(cached.logits), torch.stack(uncached.logits))
        # Against one plain forward, so that both could not be wrong in the same way.
        whole = logits_of(model, cached.sequences[:, :-1])[:, prompt.shape[1] - 1 :]
        assert_close(torch.stack(cached.logits, dim=1), whole)

    @all_architectures
    def test_chunked_prefill_equals_one_prefill(self, name: str) -> None:
        model = build_patched(name)
        cache = DynamicCache(config=model.config)
        chunks = [
            logits_of(model, chunk, past_key_values=cache, use_cache=True)
            for chunk in TOKENS.split([WINDOW - 5, 9, LENGTH - WINDOW - 4], dim=1)
        ]
        assert_close(torch.cat(chunks, dim=1), logits_of(model))

    def test_a_static_cache_equals_none(self) -> None:
        model = build_patched("llama")
        cache = StaticCache(config=model.config, max_cache_len=LENGTH)
        chunks = [
            logits_of(model, chunk, past_key_values=cache, use_cache=True)
            for chunk in TOKENS.split([WINDOW - 5, 9, LENGTH - WINDOW - 4], dim=1)
        ]
        assert_close(torch.cat(chunks, dim=1), logits_of(model))

    @all_architectures
    def test_left_padded_rows_equal_the_rows_alone(self, name: str) -> None:
        model = build_patched(name)
        lengths = (LENGTH, WINDOW + 9)
        rows = [random_tokens(length, seed=length) for length in lengths]
        padded, masks = zip(*(left_pad(row, LENGTH - row.shape[1]) for row in rows), strict=True)
        batch = logits_of(model, torch.cat(padded), attention_mask=torch.cat(masks))
        for index, row in enumerate(rows):
            assert_close(batch[index : index + 1, LENGTH - row.shape[1] :], logits_of(model, row))

    def test_left_padding_reaches_a_second_call_through_the_cache(self) -> None:
        model = build_patched("llama")
        pads, split = 11, WINDOW + 15
        padded, mask = left_pad(TOKENS, pads)
        cache = DynamicCache(config=model.config)
        for part in (slice(0, split), slice(split, None)):
            logits = logits_of(
                model, padded[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache, use_cache=True
            )
        assert_close(logits, logits_of(model)[:, split - pads :])

    def test_left_padding_is_seen_with_embeddings_as_input(self) -> None:
        model = build_patched("llama")
        padded, mask = left_pad(TOKENS, 11)
        with torch.no_grad():
            logits = model(inputs_embeds=model.get_input_embeddings()(padded), attention_mask=mask).logits
        assert_close(logits[:, 11:], logits_of(model))

    @all_architectures
    def test_packed_rows_equal_the_rows_alone(self, name: str) -> None:
        model = build_patched(name)
        rows = [random_tokens(WINDOW + 17, seed=1), random_tokens(WINDOW + 6, seed=2)]
        positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
        # Without a mask and without a cache, transformers takes positions that restart as rows of their own.
        packed = logits_of(model, torch.cat(rows, dim=1), position_ids=positions, use_cache=False)
        alone = torch.cat([logits_of(model, row) for row in rows], dim=1)
        assert_close(packed, alone)

    def test_a_prepared_mask_with_positions(self) -> None:
        model = build_patched("llama")
        mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
        positions = torch.arange(LENGTH)[None]
        assert_close(logits_of(model, attention_mask=mask, position_ids=positions), logits_of(model))

    def test_positions_may_start_anywhere(self) -> None:
        """RoPE is relative, so a shift of all positions shows the scale alone."""
        start = 7 * WINDOW
        positions = (torch.arange(LENGTH) + start)[None]
        weights = build_tiny_model("llama").state_dict()
        extension = Extension(method="eabf", factor=4.0, window=WINDOW, unscaled_layers=(0, 1))
        shifted = _ShiftedExtension(**vars(extension), start=start)
        expected = reference_forward(build_tiny_config("llama"), weights, TOKENS[0].tolist(), shifted)
        actual = logits_of(build_patched("llama"), position_ids=positions)
        assert_close(actual[0].double(), torch.from_numpy(expected.logits))


class _ShiftedExtension(Extension):
    """Scales as if the first token stood at `start`."""

    def __init__(self, *, start: int, **fields: Any) -> None:
        super().__init__(**fields)
        object.__setattr__(self, "start", start)

    def logit_scale(self, position: int, layer: int) -> float:
        return super().logit_scale(position + self.start, layer)


class TestKernels:
    @all_architectures
    def test_eager_equals_the_default_kernel(self, name: str) -> None:
        eager = build_patched(name, attn_implementation="eager")
        assert_close(logits_of(eager), logits_of(build_patched(name)))

    @pytest.mark.slow
    def test_flex_attention_equals_sdpa(self) -> None:
        flex = build_patched("llama", attn_implementation="flex_attention")
        assert_close(logits_of(flex), logits_of(build_patched("llama")))

    @all_architectures
    def test_output_attentions_shows_the_scaled_softmax(self, name: str) -> None:
        model = build_patched(name, attn_implementation="eager")
        with torch.no_grad():
            attentions = model(TOKENS, output_attentions=True).attentions
        extension = Extension(method="eabf", factor=4.0, window=WINDOW, unscaled_layers=(0, 1))
        expected = reference_forward(build_tiny_config(name), model.state_dict(), TOKENS[0].tolist(), extension)
        assert len(attentions) == len(expected.attentions)
        for layer, (actual, wanted) in enumerate(zip(attentions, expected.attentions, strict=True)):
            np.testing.assert_allclose(actual[0].numpy(), wanted, atol=2e-5, err_msg=f"layer {layer}")

    def test_a_kernel_chosen_while_patched_is_used_and_stays(self) -> None:
        model = build_patched("llama")
        model.set_attn_implementation("eager")
        with torch.no_grad():
            assert all(weights is not None for weights in model(TOKENS, output_attentions=True).attentions)
        remove_method(model)
        stock = build_tiny_model("llama", attn_implementation="eager")
        assert torch.equal(logits_of(model), logits_of(stock))
        assert model.config._attn_implementation == "eager"

    @pytest.mark.parametrize("name", [*DIVERSE, "qwen3", "olmo3"])
    def test_flash_attention_gets_a_scaled_query_and_its_own_name(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A stand-in kernel, because the real one needs a GPU."""
        scaled = record_kernel_calls(build_patched(name, "eabf"), "flash_attention_2", monkeypatch)
        unscaled = record_kernel_calls(build_patched(name, "abf"), "flash_attention_2", monkeypatch)
        config = build_tiny_config(name)
        assert len(scaled) == config.num_hidden_layers
        assert [call["implementation"] for call in scaled] == ["flash_attention_2"] * len(scaled)
        # Layer 2 is the first one to be scaled, so its input is the same in both.
        t = torch.tensor([max(1.0, math.log(p + 1) / math.log(WINDOW)) for p in range(LENGTH)])
        for layer in range(3):
            expected = unscaled[layer]["query"] * (t[:, None] if layer == 2 else 1.0)
            torch.testing.assert_close(scaled[layer]["query"], expected, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(scaled[layer]["key"], unscaled[layer]["key"], rtol=0, atol=0)
            assert scaled[layer]["scaling"] == unscaled[layer]["scaling"]

    def test_the_scale_is_computed_in_float32_in_a_bfloat16_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Far apart, so that a position, a logarithm or a quotient rounded to bfloat16 shows in some of them.
        positions = (WINDOW + 37 * torch.arange(LENGTH))[None]
        scaled, unscaled = (
            record_kernel_calls(
                build_patched("llama", method, dtype=torch.bfloat16),
                "sdpa",
                monkeypatch,
                position_ids=positions,
            )
            for method in ("eabf", "abf")
        )
        t = torch.tensor([math.log(p + 1) / math.log(WINDOW) for p in positions[0].tolist()])
        query = unscaled[2]["query"]
        assert query.dtype == scaled[2]["query"].dtype == torch.bfloat16
        assert torch.equal(scaled[2]["query"], query * t[:, None].to(torch.bfloat16))

    @pytest.mark.parametrize("name", [*DIVERSE, "gemma2", "stablelm"])
    def test_gradient_checkpointing_leaves_gradients_alone(self, name: str) -> None:
        gradients, calls = [], []
        for checkpointing in (False, True):
            model = build_patched(name).train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            count: list[int] = []
            model.get_decoder().layers[2].self_attn.register_forward_pre_hook(lambda *_, count=count: count.append(1))
            model(TOKENS, use_cache=False).logits.square().mean().backward()
            gradients.append({key: weight.grad for key, weight in model.named_parameters()})
            calls.append(len(count))
        assert calls == [1, 2], "the second run recomputes the layer"
        for key, plain in gradients[0].items():
            torch.testing.assert_close(gradients[1][key], plain, rtol=1e-4, atol=1e-7, msg=key)

    def test_gradients_flow_through_the_scale(self) -> None:
        """The gradient of layer 2's query weights against a finite difference."""
        model = build_patched("llama")
        weight = model.model.layers[2].self_attn.q_proj.weight
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        model = model.double()

        def loss() -> Tensor:
            return model(TOKENS).logits.square().mean()

        weight = model.model.layers[2].self_attn.q_proj.weight
        loss().backward()
        slope = (weight.grad * direction).sum()
        step = 1e-4
        with torch.no_grad():
            weight += step * direction
            above = loss()
            weight -= 2 * step * direction
            below = loss()
        assert slope.item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-3)

    def test_torch_compile_takes_the_whole_graph(self) -> None:
        model = build_patched("llama")
        eager = logits_of(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(logits_of(compiled, use_cache=False), eager)


def record_kernel_calls(
    model: PreTrainedModel,
    implementation: str,
    monkeypatch: pytest.MonkeyPatch,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Run the model with a stand-in for a kernel; what each layer handed to it."""
    calls: list[dict[str, Any]] = []

    def kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        calls.append(
            {
                "query": query,
                "key": key,
                "scaling": options["scaling"],
                "implementation": module.config._attn_implementation,
            }
        )
        causal = torch.full((query.shape[2], key.shape[2]), -torch.inf, dtype=query.dtype).triu(1)
        return sdpa_attention_forward(module, query, key, value, causal[None, None], scaling=options["scaling"])

    registry: dict[str, Callable[..., Any]] = AttentionInterface._global_mapping
    monkeypatch.setitem(registry, implementation, kernel)
    model.config._attn_implementation = implementation
    logits_of(model, **kwargs)
    return calls


@pytest.mark.parametrize("method", SCALED_METHODS)
def test_the_config_that_is_described_is_complete(method: str) -> None:
    model = build_tiny_model("llama")
    apply_method(model, RopeScalingConfig(method=method, rope_theta=600_000.0 if method != "logn" else None))
    described = describe_patch(model)
    assert described.original_max_position_embeddings == WINDOW
    assert described.original_rope_theta == 10_000.0
    assert described.rope_theta == (10_000.0 if method == "logn" else 600_000.0)
    assert described.unscaled_layers == ((0, 1) if method == "eabf" else ())
