"""The bundled modelling file under a server: what vLLM's Transformers backend asks of custom code, without vLLM.

The backend (vllm/model_executor/models/transformers and "Writing custom models" in its documentation; SGLang's is
made after it) builds the base model without weights, puts its own attention function and projections in, and keeps
the keys and values itself. `_Server` here does the same in a few lines.
"""

from __future__ import annotations

import ast
import inspect
import math
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eabf_cli import apply_eabf
from eabf_cli.core.checkpoint_format import join_config
from eabf_cli.core.resolution import resolve_scaling
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.modeling_eabf import FAMILIES, logit_scale
from tests.test_modeling_eabf import EXTRA, SIZES, WINDOW, build_model, random_ids

SERVER = "recording-server"
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
REQUESTS = (WINDOW // 2, 3 * WINDOW, 2 * WINDOW + 5)
NUM_DECODED = 3
# The three factors of Granite that stand outside of its attention.
GRANITE = {"logits_scaling": 8.0, "embedding_multiplier": 1.5, "residual_multiplier": 0.7}


@pytest.fixture(scope="module", autouse=True)
def _modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code that comes with a checkpoint is cached in a folder of this test run."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("hf_modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", list(sys.path))
        yield


class _Attention:
    """One layer's attention in the server: keys and values of each request, and what it was called with."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.queries: list[Tensor] = []
        self.scalings: list[float] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, requests: Tensor) -> Tensor:
        """Causal attention of new tokens (token, heads, head_dim) to their own request, in float64."""
        self.queries.append(query.clone())
        self.scalings.append(scaling)
        output = torch.empty_like(query)
        for request in requests.unique().tolist():
            new = requests == request
            keys = self._remembered(self.keys, request, key[new])
            values = self._remembered(self.values, request, value[new])
            shared = query.shape[1] // key.shape[1]
            keys, values = (x.double().repeat_interleave(shared, dim=1) for x in (keys, values))
            logits = scaling * torch.einsum("qhd,khd->hqk", query[new].double(), keys)
            before = len(keys) - int(new.sum())
            visible = torch.arange(len(keys)) <= before + torch.arange(int(new.sum()))[:, None]
            weights = logits.masked_fill(~visible, -math.inf).softmax(-1)
            output[new] = torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)
        return output

    @staticmethod
    def _remembered(store: dict[int, Tensor], request: int, new: Tensor) -> Tensor:
        store[request] = torch.cat([store[request], new]) if request in store else new
        return store[request]


def _server_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    attention_instances: dict[int, _Attention] | None = None,
    requests: Tensor | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """What a server registers with transformers: it takes (1, heads, token, head_dim), and makes its own mask."""
    assert attention_instances is not None, "the model did not hand its keyword arguments down"
    assert attention_mask is None
    query, key, value = (x.transpose(1, 2)[0] for x in (query, key, value))
    output = attention_instances[module.layer_idx](query, key, value, scaling, requests)
    return output.reshape(1, len(query), -1), None


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS[SERVER] = _server_attention
    yield
    del ALL_ATTENTION_FUNCTIONS[SERVER]


class _Server:
    """A checkpoint folder, served: `run` takes the new tokens of several requests as one row."""

    def __init__(self, folder: Path) -> None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        config.get_text_config()._attn_implementation = SERVER
        self.config = config
        with init_empty_weights(include_buffers=False):
            self.model = AutoModel.from_config(config, trust_remote_code=True).eval()
        weights = load_file(folder / "model.safetensors")
        self.lm_head = weights["lm_head.weight"]
        base = {name.removeprefix("model."): x for name, x in weights.items() if name.startswith("model.")}
        self.model.load_state_dict(base, strict=True, assign=True)
        self.attention = {layer: _Attention() for layer in range(config.num_hidden_layers)}
        self.lengths = dict.fromkeys(range(len(REQUESTS)), 0)

    @torch.no_grad()
    def run(self, tokens: dict[int, Tensor]) -> dict[int, Tensor]:
        """Request -> its new tokens (token,), to request -> their logits (token, vocabulary)."""
        requests = torch.cat([torch.full_like(new, request) for request, new in tokens.items()])
        positions = torch.cat([self.lengths[request] + torch.arange(len(new)) for request, new in tokens.items()])
        outputs = self.model(
            input_ids=torch.cat(list(tokens.values()))[None],
            inputs_embeds=None,
            use_cache=False,
            position_ids=positions[None],
            attention_instances=self.attention,
            requests=requests,
            return_dict=False,
        )
        for request, new in tokens.items():
            self.lengths[request] += len(new)
        logits = outputs[0][0] @ self.lm_head.T * getattr(self.config, "logit_scale", 1.0)
        return {request: logits[requests == request] for request in tokens}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> folder of a random checkpoint of it."""
    root = tmp_path_factory.mktemp("served")
    written: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in written:
            fields = GRANITE if family == "granite" else {}
            build_model(family, tie_word_embeddings=False, **fields).save_pretrained(root / family)
            written[family] = root / family
        return written[family]

    return folder


def patched_model(family: str, folder: Path) -> Any:
    """The same weights in the family's own class, patched in memory by the package."""
    fields = {**SIZES, **EXTRA.get(family, {}), "max_position_embeddings": WINDOW, "rope_theta": 10_000.0}
    fields["tie_word_embeddings"] = False
    fields |= GRANITE if family == "granite" else {}
    model = AutoModelForCausalLM.from_config(FAMILIES[family].config.family_config(**fields)).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    apply_eabf(model, factor=4.0, rope_theta=500_000.0)
    return model


# ---- Served, it says what the package says -----------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_served_logits_are_those_of_the_package(family: str, folders: Callable[[str], Path]) -> None:
    folder = folders(family)
    server, reference = _Server(folder), patched_model(family, folder)
    texts = {request: random_ids(1, length + NUM_DECODED)[0] for request, length in enumerate(REQUESTS)}
    # The prompts in two chunks that do not end together, then one token of each request at a time.
    steps = [
        {0: texts[0][: REQUESTS[0]], 1: texts[1][:20]},
        {1: texts[1][20 : REQUESTS[1]], 2: texts[2][: REQUESTS[2]]},
        *(
            {request: texts[request][length + step : length + step + 1] for request, length in enumerate(REQUESTS)}
            for step in range(NUM_DECODED)
        ),
    ]
    served: dict[int, list[Tensor]] = {request: [] for request in texts}
    for step in steps:
        for request, logits in server.run(step).items():
            served[request].append(logits)
    for request, text in texts.items():
        expected = reference(text[None]).logits[0]
        torch.testing.assert_close(torch.cat(served[request]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_query_that_reaches_the_server_is_scaled_in_the_scaled_layers_only(
    family: str, folders: Callable[[str], Path]
) -> None:
    first_scaled = 2
    queries = {}
    for name in ("scaled", "plain"):
        server = _Server(folders(family))
        if name == "plain":
            for layer in server.model.layers:
                own = type(layer.self_attn)
                layer.self_attn.__class__ = own.__mro__[2] if own.__name__.startswith("EABF") else own
                assert not type(layer.self_attn).__name__.startswith("EABF")
        server.run({1: random_ids(1, 3 * WINDOW)[0]})
        queries[name] = [server.attention[layer].queries[0] for layer in range(first_scaled + 1)]
        scalings = [layer.self_attn.scaling for layer in server.model.layers]
        assert [server.attention[layer].scalings[0] for layer in server.attention] == scalings
    t = logit_scale("eabf", torch.arange(3 * WINDOW), WINDOW)
    assert t.max() > 1.3
    for layer in range(first_scaled):
        assert torch.equal(queries["scaled"][layer], queries["plain"][layer])
    torch.testing.assert_close(queries["scaled"][first_scaled], queries["plain"][first_scaled] * t[:, None, None])


def test_the_model_keeps_nothing_between_calls(folders: Callable[[str], Path]) -> None:
    server = _Server(folders("llama"))
    before = {name: set(vars(module)) for name, module in server.model.named_modules()}
    tokens = random_ids(1, 2 * WINDOW)[0]
    first = server.run({0: tokens})[0]
    assert {name: set(vars(module)) for name, module in server.model.named_modules()} == before
    # A request of another number knows nothing of the first, in the same positions.
    assert torch.equal(server.run({1: tokens})[1], first)


# ---- What the server finds in the configuration --------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_model_is_named_and_says_that_it_can_be_served(family: str, folders: Callable[[str], Path]) -> None:
    config = AutoConfig.from_pretrained(folders(family), trust_remote_code=True)
    name = config.auto_map["AutoModel"].rpartition(".")[2]
    base_class = getattr(sys.modules[type(config).__module__], name)
    assert base_class.is_backend_compatible()
    assert base_class is FAMILIES[family].model or base_class.__name__ == FAMILIES[family].model.__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_the_server_finds_the_extended_window_and_no_factor_to_multiply_it_by(
    family: str, folders: Callable[[str], Path]
) -> None:
    config = AutoConfig.from_pretrained(folders(family), trust_remote_code=True)
    assert config.max_position_embeddings == 4 * WINDOW
    assert config.rope_parameters["rope_type"] == "default"
    assert config.rope_parameters["rope_theta"] == 500_000.0
    assert "factor" not in config.rope_parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_plans_are_the_family_s_and_name_modules_that_exist(
    family: str, folders: Callable[[str], Path]
) -> None:
    server = _Server(folders(family))
    family_config = FAMILIES[family].config.family_config
    assert server.config.base_model_tp_plan == family_config.base_model_tp_plan
    assert server.config.base_model_pp_plan == family_config.base_model_pp_plan
    names = {name.replace(".2.", ".*.") for name, _ in server.model.named_modules()}
    planned = [name for name in server.config.base_model_tp_plan if not name.endswith("_norm")]
    assert planned
    assert set(planned) <= names
    assert set(server.config.base_model_pp_plan) <= {name for name, _ in server.model.named_children()}


# ---- What the server does to the code ------------------------------------------------------------------


def attention_classes() -> list[type[nn.Module]]:
    return [family.model.attention_class for family in FAMILIES.values()]


def parsed_forward(attention_class: type[nn.Module]) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(attention_class.forward)))
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    return function


@pytest.mark.parametrize("attention_class", attention_classes(), ids=lambda cls: cls.__name__)
def test_one_call_of_the_attention_interface_is_found_with_its_scaling(attention_class: type[nn.Module]) -> None:
    forward = parsed_forward(attention_class)
    from_interface = {
        target.id
        for node in ast.walk(forward)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS[")
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    calls = [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in from_interface
    ]
    assert len(calls) == 1
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in calls[0].keywords}
    assert given["scaling"] == "self.scaling"
    assert given[None] == "kwargs"


@pytest.mark.parametrize("attention_class", attention_classes(), ids=lambda cls: cls.__name__)
def test_the_source_of_forward_can_be_taken_out_of_its_class(attention_class: type[nn.Module]) -> None:
    assert inspect.unwrap(attention_class.forward) is attention_class.forward
    assert not attention_class.forward.__code__.co_freevars
    names = {
        getattr(node, "attr", None) or getattr(node, "id", None) for node in ast.walk(parsed_forward(attention_class))
    }
    assert "super" not in names
    assert not [name for name in names if name and name.startswith("__") and not name.endswith("__")]


class _FusedProjection(nn.Module):
    """One matrix for query, key and value."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [part.out_features for part in parts]
        self.merged = nn.Linear(parts[0].in_features, sum(self.sizes), bias=parts[0].bias is not None)
        with torch.no_grad():
            self.merged.weight.copy_(torch.cat([part.weight for part in parts]))
            if parts[0].bias is not None:
                self.merged.bias.copy_(torch.cat([part.bias for part in parts]))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        return self.merged(hidden_states).split(self.sizes, dim=-1)


def with_fused_projections(attention_class: type[nn.Module]) -> Callable[..., Any]:
    """`forward` rewritten so that it calls `self.qkv_proj` once in place of the three projections."""
    forward = parsed_forward(attention_class)
    found = []

    class Rewriter(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            self.generic_visit(node)
            if isinstance(node.func, ast.Attribute) and node.func.attr in PROJECTIONS:
                assert [ast.unparse(argument) for argument in node.args] == ["hidden_states"]
                assert not node.keywords
                found.append(node.func.attr)
                return ast.Name(id=f"fused_{node.func.attr}", ctx=ast.Load())
            return node

    Rewriter().visit(forward)
    assert sorted(found) == sorted(PROJECTIONS)
    split = ast.parse(", ".join(f"fused_{name}" for name in PROJECTIONS) + " = self.qkv_proj(hidden_states)")
    forward.body.insert(0, split.body[0])
    for argument in [*forward.args.args, forward.args.kwarg]:
        assert argument is not None
        argument.annotation = None
    forward.returns = None
    module = ast.fix_missing_locations(ast.Module(body=[forward], type_ignores=[]))
    namespace: dict[str, Any] = {}
    exec(compile(module, "rewritten", "exec"), attention_class.forward.__globals__, namespace)
    return namespace["forward"]


@pytest.mark.parametrize("family", FAMILIES)
def test_fusing_the_projections_in_the_source_changes_no_logit(family: str, folders: Callable[[str], Path]) -> None:
    tokens = {0: random_ids(1, 3 * WINDOW)[0]}
    expected = _Server(folders(family)).run(tokens)[0]
    server = _Server(folders(family))
    rewritten = 0
    for layer in server.model.layers:
        attention = layer.self_attn
        if type(attention).__name__.startswith("EABF"):
            attention.qkv_proj = _FusedProjection([getattr(attention, name) for name in PROJECTIONS])
            for name in PROJECTIONS:
                delattr(attention, name)
            attention.forward = types.MethodType(with_fused_projections(type(attention)), attention)
            rewritten += 1
    assert rewritten
    torch.testing.assert_close(server.run(tokens)[0], expected, atol=1e-5, rtol=1e-5)


class _ShapeProxy(fx.Proxy):
    """What stands for a value while tracing; the one whose length is asked for is (batch, token)."""

    def __len__(self) -> int:
        return 2


class _Tracer(fx.Tracer):
    """Every submodule is a leaf."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ShapeProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        return iter([obj[0], obj[1]])


@pytest.mark.parametrize("family", FAMILIES)
def test_tracing_finds_the_three_projections_of_the_hidden_states(family: str) -> None:
    attention = build_model(family).model.layers[2].self_attn
    tracer = _Tracer()
    try:
        graph = tracer.trace(attention, concrete_args={"past_key_values": None})
    except (fx.proxy.TraceError, TypeError):
        # The keyword arguments end the trace, at the attention interface.
        graph = tracer.graph
    of_hidden_states = [
        node.target
        for node in graph.nodes
        if node.op == "call_module"
        and isinstance(attention.get_submodule(node.target), nn.Linear)
        and [str(argument) for argument in node.args] == ["hidden_states"]
    ]
    assert of_hidden_states == list(PROJECTIONS)


# ---- The stock form, whose scale servers have in classes of their own ------------------------------------


def native_config() -> dict[str, Any]:
    raw = {**SIZES, "model_type": "llama", "max_position_embeddings": 4096, "rope_theta": 10_000.0}
    base = FAMILIES["llama"].config.family_config(**raw)
    resolution = resolve_scaling(base, RopeScalingConfig(method="native", factor=4.0))
    return join_config(raw, resolution.base_config, resolution.scaling)


def test_the_native_form_tells_each_server_its_temperature_where_it_looks() -> None:
    config = native_config()
    beta = 1 / math.log(4096)
    # transformers and mlx-lm; a rope_type of yarn would make vLLM take c as the window.
    assert config["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 500_000.0,
        "llama_4_scaling_beta": beta,
        "original_max_position_embeddings": 4096,
    }
    # vLLM's own class for Ministral 3 reads this and not the rope_parameters.
    assert config["llama_4_scaling"] == {"original_max_position_embeddings": 4096, "beta": beta}
    # SGLang's takes c from the top level.
    assert config["original_max_position_embeddings"] == 4096
    assert config["max_position_embeddings"] == 16_384
