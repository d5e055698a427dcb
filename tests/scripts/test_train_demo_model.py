"""The training script on a small text and a small model: same rows, same weights, kill or no kill."""

import dataclasses
import json
import random
import struct
import sys
import zlib
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eabf_cli
from eabf_cli.core.needles import templates_of

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_MODEL = Path(eabf_cli.__path__[0]) / "demo" / "eabf-tiny"


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path():
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    yield
    sys.path.remove(str(REPOSITORY / "scripts"))


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory, scripts_on_path) -> Path:
    """About 20 KB of text in two of the sources, as the `corpus` step leaves it, encoded by the demo tokenizer."""
    from train_demo_model import main

    folder = tmp_path_factory.mktemp("demo")
    (folder / "text").mkdir()
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(300)]
    for name in ("austen", "bible"):
        sentences = [" ".join(rng.choices(words, k=12)).capitalize() + "." for _ in range(200)]
        (folder / "text" / f"{name}.train.txt").write_text(" ".join(sentences[:180]))
        (folder / "text" / f"{name}.heldout.txt").write_text(" ".join(sentences[180:]))
    main(["tokenizer", "--work-dir", str(folder), "--init-from", str(DEMO_MODEL)])
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL, model_max_length=1_000_000)


def tiny_model():
    from demo_training import new_model

    return new_model(
        4096,
        seed=3,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        max_position_embeddings=192,
    )


def tiny_config():
    from demo_training import TrainConfig

    return TrainConfig(
        steps=8, warmup_steps=2, decay_steps=4, batch_size=4, save_every=3, compile=False, learning_rate=1e-2
    )


def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(work_dir, tokenizer, tmp_path):
    from demo_rows import TextMixture
    from demo_training import train

    text, config = TextMixture.load(work_dir / "tokens"), tiny_config()
    whole = tiny_model()
    logs = list(train(whole, tokenizer, text, config, tmp_path / "whole"))
    assert logs[-1]["loss"] < logs[0]["loss"]

    interrupted = train(tiny_model(), tokenizer, text, config, tmp_path / "killed")
    list(islice(interrupted, 5))  # dies after step 5, the last saved state is that of step 3
    interrupted.close()
    resumed = tiny_model()
    continued = list(train(resumed, tokenizer, text, config, tmp_path / "killed"))
    assert [log["step"] for log in continued] == [4, 5, 6, 7, 8]
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "killed", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    torch.testing.assert_close(loaded.lm_head.weight.float(), whole.lm_head.weight, atol=0, rtol=4e-3)
    fields = json.loads((tmp_path / "killed" / "config.json").read_text())
    assert fields["rope_theta"] == 10_000.0  # transformers 4.57 reads it here only


def test_learning_rate_warms_up_holds_and_decays():
    from demo_training import learning_rate_at

    config = dataclasses.replace(tiny_config(), learning_rate=1.0, steps=100, warmup_steps=10, decay_steps=50)
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:51] == [1.0] * 42
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.02)


def test_rows_are_full_begin_with_bos_and_hold_no_heldout_template(work_dir, tokenizer):
    from demo_rows import TextMixture, draw_row

    text = TextMixture.load(work_dir / "tokens")
    rows = [draw_row(random.Random(seed), text, tokenizer, 513) for seed in range(300)]
    assert {len(row) for row in rows} == {513}
    assert all(row[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in row[1:] for row in rows)
    joined = "\n".join(tokenizer.batch_decode(rows))
    for template in templates_of("heldout"):
        assert template.question.split("{")[0].strip() not in joined
    for template in (*templates_of("train"), *templates_of("standard")):
        assert template.question.split("{")[0].strip() in joined, template.name


def test_span_rows_repeat_over_the_whole_window(work_dir, tokenizer):
    from demo_rows import TextMixture, span_row

    text = TextMixture.load(work_dir / "tokens")
    distances = []
    for seed in range(60):
        row = span_row(random.Random(seed), text, tokenizer, 513)
        seen: dict[tuple[int, ...], int] = {}
        for end in range(8, len(row)):
            gram = tuple(row[end - 8 : end])
            distances.append(end - seen.setdefault(gram, end))
    assert sum(distance > 100 for distance in distances) > 100
    assert max(distances) > 400


def test_the_last_part_of_a_text_is_held_out():
    from demo_corpus import split_held_out

    paragraphs = [f"{index:010}" for index in range(100)]
    train, held_out = split_held_out(paragraphs)
    assert train + held_out == paragraphs
    assert len(held_out) == 5


def test_html_becomes_paragraphs(tmp_path):
    from demo_corpus import html_paragraphs

    page = "<html><head><title>No</title></head><body><h1>A &amp; B</h1><p>one\n <b>two</b></p><script>no</script>"
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.html").write_text(page + "<ul><li>three<li>four</ul></body></html>")
    assert list(html_paragraphs("pages")(tmp_path)) == ["A & B", "one two", "three", "four"]


def test_r_strings_become_paragraphs(tmp_path):
    """Built from R's serialization format: an XDR header, then (flags, length, bytes) for each string."""
    from demo_corpus import austen_paragraphs

    def block(lines: list[str]) -> bytes:
        strings = b"".join(struct.pack(">ii", 0x00040009, len(line)) + line.encode() for line in lines)
        data = b"X\n" + struct.pack(">iiiii", 3, 0x40201, 0x30500, 16, len(lines)) + strings
        return struct.pack(">I", len(data)) + zlib.compress(data)

    folder = tmp_path / "usr/lib/R/site-library/janeaustenr/data"
    folder.mkdir(parents=True)
    (folder / "Rdata.rdb").write_bytes(block(["EMMA", "", "handsome,", "clever"]) + block(["PERSUASION"]))
    assert list(austen_paragraphs(tmp_path)) == ["EMMA", "handsome, clever", "PERSUASION"]


def test_sentences_join_to_the_text_and_fill_a_sample(tokenizer):
    from demo_data import MAX_TOKENS, MIN_TOKENS, draw_sample, split_sentences

    text = 'He said: "Go!" She went.\n\nA title\n\nThe end came; it was late. No stop'
    assert "".join(split_sentences(text)) == text
    chapter = split_sentences(" It was a fine day and nobody knew why." * 400)
    for seed in range(12):
        sample = draw_sample(random.Random(seed), chapter, [chapter], tokenizer)
        assert MIN_TOKENS <= len(tokenizer.encode(sample)) <= MAX_TOKENS
