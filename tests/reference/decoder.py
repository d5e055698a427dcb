"""The decoder itself: one sequence, no batch, no cache, float64 throughout."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .extension import Array, Extension, rope_frequencies, stepped_scale
from .family import FAMILIES, Family, attention_multiplier, has_rope, is_sliding


@dataclass
class ReferenceOutput:
    """What one forward gives."""

    logits: Array
    """`(length, vocabulary)`."""
    attentions: list[Array] = field(default_factory=list)
    """Per layer, `(heads, length, length)`: the softmax attention, zero where a key is not visible."""


def reference_forward(
    config: Any, weights: Mapping[str, Any], tokens: list[int], extension: Extension | None = None
) -> ReferenceOutput:
    """Logits and attention of `tokens` under the *unpatched* `config`, extended as `extension` says.

    Args:
        config: numbers of the model as it was before any method was applied.
        weights: its `state_dict`.
        tokens: token ids, at positions 0, 1, 2, ...
        extension: None for the model as it stands.
    """
    return _Decoder(config, weights, extension).run(tokens)


class _Decoder:
    def __init__(self, config: Any, weights: Mapping[str, Any], extension: Extension | None) -> None:
        self.config = config
        self.family: Family = FAMILIES[config.model_type]
        self.weights = {name: tensor.double().numpy() for name, tensor in weights.items()}
        self.extension = extension
        self.heads: int = config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        epsilon = self.family.epsilon
        self.epsilon: float = epsilon if isinstance(epsilon, float) else getattr(config, epsilon)
        self.activation = ACTIVATIONS[getattr(config, "hidden_activation", None) or config.hidden_act]

    def run(self, tokens: list[int]) -> ReferenceOutput:
        config, output = self.config, ReferenceOutput(logits=np.empty(0))
        hidden = self.weights["model.embed_tokens.weight"][tokens]
        if self.family.embedding_is_scaled:
            hidden = hidden * math.sqrt(config.hidden_size)
        hidden = hidden * getattr(config, "embedding_multiplier", 1.0)
        for layer in range(config.num_hidden_layers):
            hidden = self.block(hidden, layer, output)
        hidden = self.norm(hidden, f"model.{self.family.final_norm}")
        logits = self.linear(hidden, "lm_head")
        logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        output.logits = soft_cap(logits, getattr(config, "final_logit_softcapping", None))
        return output

    def block(self, hidden: Array, layer: int, output: ReferenceOutput) -> Array:
        """One decoder layer: `hidden` `(length, hidden_size)` in and out."""
        family, prefix = self.family, f"model.layers.{layer}"
        parallel = family.parallel or getattr(self.config, "use_parallel_residual", False)
        gain = getattr(self.config, "residual_multiplier", 1.0)

        normed = self.norm_if(hidden, prefix, family.before_attention)
        attended = self.attention(normed, layer, output)
        after_attention = hidden + gain * self.norm_if(attended, prefix, family.after_attention)
        if parallel:
            return after_attention + self.mlp(normed, f"{prefix}.{family.mlp}")
        normed = self.norm_if(after_attention, prefix, family.before_mlp)
        transformed = self.mlp(normed, f"{prefix}.{family.mlp}")
        return after_attention + gain * self.norm_if(transformed, prefix, family.after_mlp)

    def attention(self, hidden: Array, layer: int, output: ReferenceOutput) -> Array:
        prefix = f"model.layers.{layer}.self_attn"
        query, key, value = self.project(hidden, prefix)
        length = len(hidden)
        if has_rope(self.config, layer):
            query = self.rotate(query, layer)
            key = self.rotate(key, layer)

        multiplier = attention_multiplier(self.config, self.head_dim)
        cap = getattr(self.config, "attn_logit_softcapping", None)
        mixed = np.zeros((length, self.heads, self.head_dim))
        probabilities = np.zeros((self.heads, length, length))
        for head in range(self.heads):
            key_head = head * self.key_heads // self.heads
            for position in range(length):
                first = self.first_visible(position, layer)
                seen = slice(first, position + 1)
                scale = self.logit_scale(position, layer)
                logits = scale * multiplier * (key[seen, key_head] @ query[position, head])
                row = softmax(soft_cap(logits, cap))
                probabilities[head, position, seen] = row
                mixed[position, head] = row @ value[seen, key_head]
        output.attentions.append(probabilities)
        return self.linear(mixed.reshape(length, -1), f"{prefix}.{self.family.output_projection}")

    def project(self, hidden: Array, prefix: str) -> tuple[Array, Array, Array]:
        """Query, key and value, each `(length, heads, head_dim)`, normed where the family norms them."""
        query_width, key_width = self.heads * self.head_dim, self.key_heads * self.head_dim
        if f"{prefix}.qkv_proj.weight" in self.weights:
            fused = self.linear(hidden, f"{prefix}.qkv_proj")
            query, key, value = np.split(fused, [query_width, query_width + key_width], axis=-1)
        else:
            query, key, value = (self.linear(hidden, f"{prefix}.{part}_proj") for part in "qkv")
        clip = getattr(self.config, "clip_qkv", None)
        if clip is not None:
            query, key, value = (np.clip(part, -clip, clip) for part in (query, key, value))
        query = self.head_norm(query, f"{prefix}.q", self.heads)
        key = self.head_norm(key, f"{prefix}.k", self.key_heads)
        return query, key, value.reshape(len(hidden), self.key_heads, self.head_dim)

    def head_norm(self, flat: Array, prefix: str, heads: int) -> Array:
        """`flat` `(length, heads * head_dim)` split into heads; a norm covers one head or the full width."""
        split = flat.reshape(len(flat), heads, self.head_dim)
        if f"{prefix}_layernorm.norms.0.weight" in self.weights:  # one set of weights for each head
            normed = [self.norm(split[:, head], f"{prefix}_layernorm.norms.{head}") for head in range(heads)]
            return np.stack(normed, axis=1)
        for name in (f"{prefix}_norm", f"{prefix}_layernorm"):
            if f"{name}.weight" in self.weights:
                full_width = self.weights[f"{name}.weight"].shape == (heads * self.head_dim,)
                return self.norm(flat if full_width else split, name).reshape(split.shape)
        return split

    def rotate(self, vectors: Array, layer: int) -> Array:
        """Turn pair j of the vector at position p by p * frequency_j; `vectors` `(length, heads, head_dim)`."""
        frequencies, gain = self.frequencies(layer, length=len(vectors))
        dim = 2 * len(frequencies)
        positions = np.arange(len(vectors))[:, None]
        turned = vectors.copy()
        for j, frequency in enumerate(frequencies):
            a, b = (j, j + dim // 2) if self.family.pairs == "halves" else (2 * j, 2 * j + 1)
            cosine, sine = gain * np.cos(positions * frequency), gain * np.sin(positions * frequency)
            turned[..., a] = vectors[..., a] * cosine - vectors[..., b] * sine
            turned[..., b] = vectors[..., b] * cosine + vectors[..., a] * sine
        return turned

    def frequencies(self, layer: int, length: int) -> tuple[Array, float]:
        """Frequencies of `layer` and the factor on its cosine and sine.

        A family with a rotary of its own for sliding layers keeps those as they were; where all layers share
        one rotary, all of them change.
        """
        fields = self.config.rope_parameters
        own_rotary = "rope_theta" not in fields
        if own_rotary:
            fields = fields["sliding_attention" if is_sliding(self.config, layer) else "full_attention"]
        theta = fields["rope_theta"]
        dim = int(self.head_dim * fields.get("partial_rotary_factor", 1.0))
        if self.extension is None or (own_rotary and is_sliding(self.config, layer)):
            return rope_frequencies(theta, dim), 1.0
        return self.extension.inverse_frequencies(theta, dim, length), self.extension.rotation_gain()

    def first_visible(self, position: int, layer: int) -> int:
        return max(0, position - self.config.sliding_window + 1) if is_sliding(self.config, layer) else 0

    def logit_scale(self, position: int, layer: int) -> float:
        """t: of the extension in full-attention layers with RoPE, times what the family does by itself."""
        scale = 1.0
        own_beta = self.config.rope_parameters.get("llama_4_scaling_beta")
        if own_beta is not None:
            window = self.config.rope_parameters["original_max_position_embeddings"]
            scale *= stepped_scale(position, window, own_beta)
        if self.extension and has_rope(self.config, layer) and not is_sliding(self.config, layer):
            scale *= self.extension.logit_scale(position, layer)
        return scale

    def mlp(self, hidden: Array, prefix: str) -> Array:
        if f"{prefix}.experts.down_proj" in self.weights:
            return self.experts(hidden, prefix)
        for up, down in (("up_proj", "down_proj"), ("fc1", "fc2"), ("c_fc", "c_proj")):
            if f"{prefix}.{up}.weight" in self.weights:
                raised = self.linear(hidden, f"{prefix}.{up}")
                if f"{prefix}.gate_proj.weight" in self.weights:
                    raised = raised * self.activation(self.linear(hidden, f"{prefix}.gate_proj"))
                else:
                    raised = self.activation(raised)
                return self.linear(raised, f"{prefix}.{down}")
        gate, raised = np.split(self.linear(hidden, f"{prefix}.gate_up_proj"), 2, axis=-1)
        return self.linear(self.activation(gate) * raised, f"{prefix}.down_proj")

    def experts(self, hidden: Array, prefix: str) -> Array:
        """Each token's best experts, mixed by router probability, and the shared expert where there is one."""
        gate_up, down = (self.weights[f"{prefix}.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
        renormalise = self.family.always_renormalised or self.config.norm_topk_prob
        router = self.linear(hidden, f"{prefix}.{self.family.router}")
        mixed = np.zeros_like(hidden)
        for token, vector in enumerate(hidden):
            probability = softmax(router[token])
            chosen = np.argsort(probability)[-self.config.num_experts_per_tok :]
            total = probability[chosen].sum() if renormalise else 1.0
            for expert in chosen:
                gate, raised = np.split(gate_up[expert] @ vector, 2)
                opinion = down[expert] @ (self.activation(gate) * raised)
                mixed[token] += probability[expert] / total * opinion
        if f"{prefix}.shared_expert_gate.weight" in self.weights:
            opening = 1 / (1 + np.exp(-self.linear(hidden, f"{prefix}.shared_expert_gate")))
            mixed += opening * self.mlp(hidden, f"{prefix}.shared_expert")
        return mixed

    def norm_if(self, hidden: Array, prefix: str, name: str | None) -> Array:
        return hidden if name is None else self.norm(hidden, f"{prefix}.{name}")

    def norm(self, hidden: Array, name: str) -> Array:
        """The family's norm over the last dimension."""
        kind = self.family.norm
        if kind.startswith("layer"):
            hidden = hidden - hidden.mean(axis=-1, keepdims=True)
        normed = hidden / np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + self.epsilon)
        if kind == "layer_no_weight":
            return normed
        weight = self.weights[f"{name}.weight"]
        normed = normed * (1 + weight if kind == "rms_plus_one" else weight)
        return normed + self.weights.get(f"{name}.bias", 0.0)

    def linear(self, hidden: Array, name: str) -> Array:
        return hidden @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)


def softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def soft_cap(logits: Array, cap: float | None) -> Array:
    return logits if cap is None else cap * np.tanh(logits / cap)


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _squared_relu(x: Array) -> Array:
    return np.maximum(x, 0) ** 2


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": _silu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "relu2": _squared_relu,
}
