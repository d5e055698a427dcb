"""Reading in chunks and writing: the same tokens as transformers' own, and no way out of a loop but two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel

from eabf_cli.core.caches import forget_after, make_cache
from eabf_cli.core.errors import UnsupportedModelError
from eabf_cli.core.patching import apply_eabf, apply_method
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.core.summarize import compiling
from eabf_cli.core.summarize.generation import Generator
from eabf_cli.core.summarize.reading import read_tokens
from eabf_cli.core.summarize.settings import Sampling
from tests.architectures import build_tiny_model
from tests.byte_tokenizer import byte_tokenizer
from tests.tiny_llama import WINDOW, tiny_llama, token_ids

NUM_NEW = 20
CIRCLE = (10, 11, 12, 13, 14, 15)
SENTENCE_ENDS = (12, 15, 30)
SLIDING = ("mistral_sliding", "gemma3_text", "qwen2_sliding", "cohere2")


class IdTokenizer:
    """Spells every token as its number, so that a text tells its tokens; some of them end a sentence."""

    eos_token_id = 2

    def __init__(self, sentence_ends: tuple[int, ...] = ()) -> None:
        self.sentence_ends = sentence_ends

    def get_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(f" {number}{'.' * (number in self.sentence_ends)}" for number in ids)


def generator(model: PreTrainedModel, **settings: Any) -> Generator:
    return Generator(**({"model": model, "tokenizer": IdTokenizer(), "chunk_tokens": 16} | settings))


def theirs(model: PreTrainedModel, prompt: list[int], num_new: int = NUM_NEW) -> list[int]:
    """What transformers' generate() does with the whole prompt at once and its own cache."""
    row = torch.tensor([prompt])
    made = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=num_new, do_sample=False)
    return made[0, len(prompt) :].tolist()


def spelled(ids: list[int], sentence_ends: tuple[int, ...] = ()) -> str:
    return IdTokenizer(sentence_ends).decode([number for number in ids if number != IdTokenizer.eos_token_id]).lstrip()


# Not `dynamic`, whose frequencies depend on the length of each call.
@pytest.mark.parametrize("length", [1, 2, 16, 17, WINDOW - 3, 3 * WINDOW])
@pytest.mark.parametrize("method", [None, "eabf", "yarn", "logn", "native"])
def test_greedy_text_is_that_of_generate(method: str | None, length: int) -> None:
    model = tiny_llama()
    if method is not None:
        apply_method(model, RopeScalingConfig(method=method, factor=4.0))
    prompt = token_ids(length)[0].tolist()
    expected = theirs(model, prompt)
    written = generator(model).write(prompt, NUM_NEW)
    assert written.text == spelled(expected)
    assert written.num_tokens == len(expected)
    assert not written.is_looping


@pytest.mark.parametrize("family", ["qwen2", "phi3", *SLIDING])
def test_every_kind_of_cache_gives_the_text_of_generate(family: str) -> None:
    model = build_tiny_model(family)
    prompt = [3 + number % 50 for number in token_ids(100)[0].tolist()]
    assert generator(model).write(prompt, NUM_NEW).text == spelled(theirs(model, prompt))


def test_chunks_give_the_logits_of_the_whole_prompt() -> None:
    model = tiny_llama()
    apply_eabf(model, 4.0)
    ids = token_ids(3 * WINDOW)
    with torch.no_grad():
        expected = model(ids).logits[0, -1]
    for chunk_tokens in (1, 7, 64, 1000):
        logits = read_tokens(model, ids[0].tolist(), make_cache(model, ids.shape[1]), chunk_tokens=chunk_tokens)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_frequencies_that_follow_the_length_are_read_in_one_piece() -> None:
    model = tiny_llama()
    apply_method(model, RopeScalingConfig(method="dynamic", factor=4.0))
    ids = token_ids(3 * WINDOW)
    with torch.no_grad():
        expected = model(ids).logits[0, -1]
    logits = read_tokens(model, ids[0].tolist(), make_cache(model, ids.shape[1]), chunk_tokens=16)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_the_cache_holds_what_transformers_own_holds() -> None:
    model = tiny_llama()
    ids = token_ids(50)
    cache, own = make_cache(model, 50), DynamicCache(config=model.config)
    read_tokens(model, ids[0].tolist(), cache, chunk_tokens=16)
    with torch.no_grad():
        model(ids, past_key_values=own)
    for layer, other in zip(cache.layers, own.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-5)
    storage = cache.layers[0].keys.untyped_storage().data_ptr()
    forget_after(cache, 20)
    assert cache.get_seq_length() == 20
    read_tokens(model, [5], cache, chunk_tokens=16)
    # In place: nothing was copied to make room.
    assert cache.layers[0].keys.untyped_storage().data_ptr() == storage


def test_a_prompt_larger_than_the_cache_is_an_error_and_not_cut() -> None:
    model = tiny_llama()
    with pytest.raises(RuntimeError):
        read_tokens(model, token_ids(20)[0].tolist(), make_cache(model, 19), chunk_tokens=16)


def test_sampling_follows_the_seed_and_ignores_the_checkpoints_own_settings() -> None:
    model = tiny_llama()
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=2.0)
    prompt = token_ids(20)[0].tolist()
    plain = tiny_llama()
    assert generator(model).write(prompt, NUM_NEW).text == spelled(theirs(plain, prompt))
    sampling = Sampling(temperature=3.0)
    first, again, other = (
        generator(model, sampling=sampling, seed=seed).write(prompt, NUM_NEW).text for seed in (1, 1, 2)
    )
    assert first == again != other


# ---- Loops ---------------------------------------------------------------------------------------


@contextmanager
def scripted(model: PreTrainedModel, script: Any) -> Iterator[list[int]]:
    """Make the model prefer `script(tokens so far)`, by a margin that a repetition penalty may overcome."""
    seen: list[int] = []

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        seen.extend(kwargs["input_ids"][0].tolist())
        output.logits[:, -1] = 0.0
        for token, logit in script(seen).items():
            output.logits[:, -1, token] = logit
        return output

    handle = model.register_forward_hook(hook, with_kwargs=True)
    yield seen
    handle.remove()


def in_circles(seen: list[int]) -> dict[int, float]:
    """After any token of the circle its next; 30 and then the end are nearly as good."""
    last = seen[-1]
    following = CIRCLE[(CIRCLE.index(last) + 1) % len(CIRCLE)] if last in CIRCLE else CIRCLE[0]
    return {IdTokenizer.eos_token_id: 10.0} if last == 30 else {following: 10.0, 30: 9.0}


def test_a_loop_is_left_with_a_repetition_penalty() -> None:
    model, pieces = tiny_llama(), []
    with scripted(model, in_circles):
        written = generator(model, tokenizer=IdTokenizer(SENTENCE_ENDS)).write([5, 6, 7], 200, on_text=pieces.append)
    assert not written.is_looping
    assert not written.is_cut
    # The first round stays, and what of the second was shown before it was known to be one.
    assert written.text == spelled([*CIRCLE, *CIRCLE[:3], 30], SENTENCE_ENDS)
    assert "".join(pieces) == written.text


def test_a_loop_that_stays_is_told_and_shown_once() -> None:
    model, pieces = tiny_llama(), []

    def stubborn(seen: list[int]) -> dict[int, float]:
        return {token: logit * 1e6 for token, logit in in_circles(seen).items() if token != 30}

    with scripted(model, stubborn):
        written = generator(model, tokenizer=IdTokenizer(SENTENCE_ENDS)).write([5, 6, 7], 200, on_text=pieces.append)
    assert written.is_looping
    assert not written.is_cut
    assert written.num_tokens < 200
    assert written.text == spelled([*CIRCLE, *CIRCLE[:3]], SENTENCE_ENDS)
    assert "".join(pieces) == written.text


def test_sliding_layers_can_go_back_to_where_a_loop_began() -> None:
    model = build_tiny_model("gemma3_text")
    with scripted(model, in_circles):
        written = generator(model, tokenizer=IdTokenizer(SENTENCE_ENDS)).write([5, 6, 7] * 20, 200)
    assert written.text == spelled([*CIRCLE, *CIRCLE[:3], 30], SENTENCE_ENDS)


def test_the_limit_of_tokens_cuts_at_a_sentence() -> None:
    tokenizer = byte_tokenizer()
    words = tokenizer("First point. Second poi", add_special_tokens=False)["input_ids"]
    model = tiny_llama(vocab_size=300)
    with scripted(model, lambda seen: {words[len(seen) - 3]: 10.0}):
        written = generator(model, tokenizer=tokenizer).write([5, 6, 7], len(words))
    assert written.text == "First point."
    assert written.is_cut


Compiler = Callable[[torch.fx.GraphModule, list[Tensor]], Any]


@contextmanager
def compiled_by(compiler: Compiler) -> Iterator[None]:
    """Steps are compiled by this function, anew."""

    def config() -> CompileConfig:
        made = CompileConfig(backend=compiler, mode=None)
        made._compile_all_devices = True
        return made

    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "compile_config", config)
        yield
    torch.compiler.reset()


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs of compiled steps, which are run as they are."""
    seen = []

    def compiler(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        seen.append(graph)
        return graph.forward

    with compiled_by(compiler):
        yield seen


@pytest.mark.parametrize("method", [None, "eabf", "yarn"])
def test_a_compiled_step_gives_the_text_of_generate_from_one_graph(
    method: str | None, graphs: list[torch.fx.GraphModule]
) -> None:
    model = tiny_llama()
    if method is not None:
        apply_method(model, RopeScalingConfig(method=method, factor=4.0))
    compiled = generator(model, compiles=True)
    for length in (1, 2, WINDOW - 3, 3 * WINDOW):
        prompt = token_ids(length)[0].tolist()
        assert compiled.write(prompt, NUM_NEW).text == spelled(theirs(model, prompt))
    # Prompts of about one length have caches of one length.
    assert len(graphs) == 1


def test_frequencies_that_follow_the_length_do_so_in_a_compiled_step(graphs: list[torch.fx.GraphModule]) -> None:
    texts = []
    for compiles in (False, True):
        # A new model: these frequencies remember the longest call.
        model = tiny_llama()
        apply_method(model, RopeScalingConfig(method="dynamic", factor=4.0))
        texts.append(generator(model, compiles=compiles).write(token_ids(3 * WINDOW)[0].tolist(), NUM_NEW).text)
    assert texts[0] == texts[1]
    assert graphs


def test_a_compiled_step_can_go_back_to_where_a_loop_began(graphs: list[torch.fx.GraphModule]) -> None:
    # This one runs in a circle, and leaves it with the penalty.
    model = tiny_llama(vocab_size=16)
    prompt = [3 + number % 13 for number in token_ids(WINDOW, seed=2)[0].tolist()]
    plain = generator(model)
    expected = plain.write(prompt, 150)
    compiled = generator(model, compiles=True)
    assert compiled.write(prompt, 150) == expected
    assert not expected.is_looping
    assert expected.num_tokens > len(expected.text.split()) + 1, "nothing was dropped: there was no circle"
    assert len(graphs) == 1


def test_a_compiler_that_fails_is_one_message() -> None:
    def failing(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        raise RuntimeError("no working compiler\nand a long trace")

    with (
        compiled_by(failing),
        pytest.raises(UnsupportedModelError, match="RuntimeError: no working compiler\nLeave --compile out"),
    ):
        generator(tiny_llama(), compiles=True).write([5, 6, 7], NUM_NEW)
