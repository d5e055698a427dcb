"""Training samples: drawn by seed from a dataset, tokenised, fitted to a length, counted and hashed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from eabf_cli.core.data import cache
from eabf_cli.core.data.files import Records
from eabf_cli.core.data.parsing import Record, RefusedChatError
from eabf_cli.core.data.records import open_records
from eabf_cli.core.data.sample_set import IGNORE_INDEX, Sample, SampleSet, hash_samples, hash_tokens
from eabf_cli.core.data.tokenization import TokenizedText, encode_chat, encode_text, has_chat_template
from eabf_cli.core.demo import DEMO_DATASET
from eabf_cli.core.errors import DataError, InvalidConfigError
from eabf_cli.core.option_names import check_at_least_one, option_name
from eabf_cli.core.processes import num_row_parts

NUM_SAMPLES = 100
"""How many samples the paper is content with."""

TooLong = Literal["error", "truncate", "drop", "split"]
TooShort = Literal["report", "drop"]

# What decides where samples come from, not what is made of them: the hash of the contents stands for it, and the
# names under which messages know them.
_SOURCE_FIELDS = ("dataset", "dataset_split", "revision", "cache")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples to train on.

    Attributes:
        dataset: `demo-long`, a file or folder, a Hub dataset id, or a list of these
            (`eabf_cli.core.data.records.open_records`).
        dataset_split: split of a Hub dataset (default `train`) or of `demo-long` (`train`, `heldout`).
        revision: revision of a Hub dataset.
        num_samples: how many samples to draw; None takes all.
        max_length: tokens per sample at most, begin-of-sequence included.
        too_long: what happens to a longer one: "error" stops, "truncate" keeps its beginning, "drop" draws
            another instead, "split" cuts it into samples of `max_length` and a shorter rest.
        min_length: samples of fewer tokens are counted as short; None counts none. A sample that ends inside
            the window that a model has already teaches it nothing about a longer one.
        too_short: what happens to a short one: "report" keeps it and says so, "drop" draws another instead.
        seed: decides which samples are drawn, and their order.
        cache: keep the finished samples on disk and take them from there (`eabf_cli.core.data.cache`).

    Raises:
        InvalidConfigError: a number below its least value, or an unknown `too_long` or `too_short`.
    """

    dataset: str | Path | Sequence[str | Path] = DEMO_DATASET
    dataset_split: str | None = None
    revision: str | None = None
    num_samples: int | None = NUM_SAMPLES
    max_length: int = 2048
    too_long: TooLong = "error"
    min_length: int | None = None
    too_short: TooShort = "report"
    seed: int = 42
    cache: bool = True

    def __post_init__(self) -> None:
        check_at_least_one(self, "num_samples")
        if self.max_length < 2:
            raise InvalidConfigError(
                f"max_length must be at least 2 tokens (one to see, one to predict), got {self.max_length}"
            )
        if self.min_length is not None and not 1 <= self.min_length <= self.max_length:
            raise InvalidConfigError(
                f"min_length must be between 1 and max_length {self.max_length:,}, got {self.min_length:,}"
            )
        for name, value, choices in (
            ("too_long", self.too_long, get_args(TooLong)),
            ("too_short", self.too_short, get_args(TooShort)),
        ):
            if value not in choices:
                raise InvalidConfigError(f"{option_name(name)} must be one of {', '.join(choices)}, got {value!r}")


def load_samples(config: DataConfig, tokenizer: Any) -> SampleSet:
    """Draw, tokenise and fit the samples that a config asks for.

    The same config, files and tokenizer give the same samples in every process. Documents have loss on all
    tokens, conversations on the assistant's turns (`eabf_cli.core.data.tokenization`). Of samples with the same
    tokens one is used, and others are drawn for the rest; so for conversations that the chat template refuses.

    Raises:
        DataError: the dataset is missing or malformed, holds fewer samples than asked for, or a sample is too
            long and `too_long` is "error".
    """
    records = open_records(config.dataset, split=config.dataset_split, revision=config.revision)
    identity = cache.tokenizer_identity(tokenizer) if config.cache else None
    if identity is None:
        samples = _draw(config, tokenizer, records)
    else:
        settings = {name: value for name, value in asdict(config).items() if name not in _SOURCE_FIELDS}
        settings["names"] = str(config.dataset)
        key = cache.sample_key(records.content_hash(), settings, identity)
        kept = cache.read_samples(key)
        samples = _draw(config, tokenizer, records) if kept is None else kept
        if kept is None:
            cache.write_samples(key, samples)
    return replace(samples, notes=(*records.notes, *samples.notes))


def _draw(config: DataConfig, tokenizer: Any, records: Records) -> SampleSet:
    drawn = _Drawn(config, tokenizer)
    rng = random.Random(config.seed)
    # Splitting draws all pieces of the records it opens and picks among them afterwards, or a single book
    # would always be trained on from its first page.
    for reader in rng.sample(records, len(records)):
        if config.num_samples is not None and len(drawn.samples) >= config.num_samples:
            break
        drawn.add(reader())
    samples = drawn.samples
    wanted = len(samples) if config.num_samples is None else config.num_samples
    if not samples and len(drawn.refusals) == len(records):
        raise drawn.refusals[0]
    if len(samples) < wanted or not samples:
        raise DataError(_too_few(config, records, drawn))
    if config.too_long == "split":
        samples = rng.sample(samples, wanted)
    num_short = drawn.num_too_short or sum(len(sample.input_ids) < (config.min_length or 0) for sample in samples)
    return SampleSet(
        samples=tuple(samples),
        num_available=len(records),
        data_hash=hash_samples(samples),
        num_truncated=drawn.num_truncated,
        num_dropped=drawn.num_too_long + drawn.num_too_short + drawn.num_without_loss,
        num_split=drawn.num_split,
        num_duplicates=drawn.num_duplicates,
        num_refused=len(drawn.refusals),
        num_short=num_short,
        notes=tuple(_notes(config, drawn, len(samples), num_short)),
    )


def _notes(config: DataConfig, drawn: _Drawn, num_samples: int, num_short: int) -> Iterator[str]:
    if drawn.num_plain_chats:
        yield (
            "the tokenizer has no chat template: conversations are laid out as Vicuna's "
            "(USER: ..., ASSISTANT: ..., end of sequence)"
        )
    if num_short and config.too_short == "report":
        yield (
            f"{num_short:,} of {num_samples:,} samples are shorter than {config.min_length:,} tokens: "
            "too short to teach anything about a longer window"
        )
    above = f"above {config.max_length:,} tokens"
    for count, told in (
        (drawn.num_truncated, f"of {num_samples:,} samples were cut to {config.max_length:,} tokens"),
        (drawn.num_split, f"records {above} were split into samples"),
        (drawn.num_too_long, f"samples {above} were left out"),
        (drawn.num_without_loss, f"samples without loss in {config.max_length:,} tokens were left out"),
        (drawn.num_duplicates, "samples were left out because another has the same tokens"),
    ):
        if count:
            yield f"{count:,} {told}"
    if drawn.refusals:
        yield f"{len(drawn.refusals):,} conversations were left out, the first: {drawn.refusals[0]}"


@dataclass(frozen=True)
class SampleCollator:
    """Makes a batch of rows: padded on the right to one length, without loss on the padding.

    Packed rows go out with positions, padding counting as one sample more, and without a mask: only so does
    transformers keep attention inside each sample. Flash attention does that for batches of one row alone.

    Attributes:
        pad_token_id: any valid token id; it is masked and has no loss.
        multiple_of: what a row's length is a multiple of.
    """

    pad_token_id: int
    multiple_of: int = field(default=1, kw_only=True)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> SampleCollator:
        """Pad with the tokenizer's padding token, else its end of sequence, else token 0.

        Where rows are spread over processes, to as many halves as there are parts: torch gives each process one from
        the front of the row and one from the end, whose attention takes longer.
        """
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        num_parts = num_row_parts()
        return cls(
            next((token for token in candidates if token is not None), 0),
            multiple_of=2 * num_parts if num_parts > 1 else 1,
        )

    def __call__(self, samples: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        """What a model's forward takes: int64 tensors, each (batch, longest row), and `sample_index` (batch, 1).

        `input_ids` and `labels` with `attention_mask`, or, for packed rows, with `position_ids` and
        `use_cache` False: with a cache, transformers would not look at where positions start again.
        """
        import torch

        longest = max(len(sample["input_ids"]) for sample in samples)
        longest += -longest % self.multiple_of
        padding = [longest - len(sample["input_ids"]) for sample in samples]
        columns = {
            "input_ids": [s["input_ids"] + [self.pad_token_id] * n for s, n in zip(samples, padding, strict=True)],
            "labels": [s["labels"] + [IGNORE_INDEX] * n for s, n in zip(samples, padding, strict=True)],
        }
        is_packed = "position_ids" in samples[0]
        if is_packed:
            columns["position_ids"] = [
                s["position_ids"] + list(range(n)) for s, n in zip(samples, padding, strict=True)
            ]
        else:
            columns["attention_mask"] = [[1] * (longest - n) + [0] * n for n in padding]
        if "sample_index" in samples[0]:
            columns["sample_index"] = [sample["sample_index"] for sample in samples]
        batch: dict[str, Any] = {name: torch.tensor(rows, dtype=torch.long) for name, rows in columns.items()}
        return batch | {"use_cache": False} if is_packed else batch


class _Drawn:
    """Samples fitted so far, and the counts of what was done to them."""

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.samples: list[Sample] = []
        self.seen: set[bytes] = set()
        self.num_truncated = self.num_split = self.num_duplicates = 0
        self.num_too_long = self.num_too_short = self.num_without_loss = 0
        self.num_plain_chats = 0
        self.refusals: list[RefusedChatError] = []

    def add(self, record: Record) -> None:
        max_length, too_long = self.config.max_length, self.config.too_long
        try:
            tokens = _encode(self.tokenizer, record, None if too_long == "split" else max_length)
        except RefusedChatError as refusal:
            self.refusals.append(refusal)
            return
        self.num_plain_chats += record.text is None and not has_chat_template(self.tokenizer)
        if len(tokens.input_ids) <= max_length:
            self._keep(record, tokens.input_ids, tokens.has_loss)
        elif too_long == "error":
            raise DataError(_describe_too_long(record, tokens, self.config))
        elif too_long == "drop":
            self.num_too_long += 1
        elif too_long == "truncate":
            ids, has_loss = tokens.input_ids[:max_length], tokens.has_loss[:max_length]
            self.num_truncated += self._keep(record, ids, has_loss)
        else:
            self.num_split += 1
            self._split(record, tokens)

    def _split(self, record: Record, tokens: TokenizedText) -> None:
        """Consecutive pieces; each begins with BOS, since models are out of their distribution without it."""
        bos = self.tokenizer.bos_token_id
        ids, has_loss = tokens.input_ids, tokens.has_loss
        start = [] if bos is None or ids[0] != bos else [bos]
        ids, has_loss = ids[len(start) :], has_loss[len(start) :]
        size = self.config.max_length - len(start)
        for begin in range(0, len(ids), size):
            piece, piece_loss = ids[begin : begin + size], has_loss[begin : begin + size]
            self._keep(record, start + piece, [False] * len(start) + piece_loss)

    def _keep(self, record: Record, input_ids: list[int], has_loss: list[bool]) -> bool:
        # The first token is never predicted.
        if not any(has_loss[1:]):
            self.num_without_loss += 1
            return False
        if self.config.too_short == "drop" and len(input_ids) < (self.config.min_length or 0):
            self.num_too_short += 1
            return False
        tokens = hash_tokens(input_ids)
        if tokens in self.seen:
            self.num_duplicates += 1
            return False
        self.seen.add(tokens)
        labels = [token if loss else IGNORE_INDEX for token, loss in zip(input_ids, has_loss, strict=True)]
        self.samples.append(Sample(input_ids, labels, origin=record.origin))
        return True


def _encode(tokenizer: Any, record: Record, max_tokens: int | None) -> TokenizedText:
    if record.text is not None:
        return encode_text(tokenizer, record.text, max_tokens=max_tokens)
    return encode_chat(tokenizer, record.messages, record.origin, max_tokens=max_tokens)


def _describe_too_long(record: Record, tokens: TokenizedText, config: DataConfig) -> str:
    length = f"{len(tokens.input_ids):,}" if tokens.is_whole else f"more than {len(tokens.input_ids):,}"
    return (
        f"{record.origin}: the sample has {length} tokens, more than max_length {config.max_length:,}: "
        "raise the target window, or have long samples handled by --too-long truncate, drop or split"
    )


def _too_few(config: DataConfig, records: Records, drawn: _Drawn) -> str:
    reasons = {
        "too long": drawn.num_too_long,
        "too short": drawn.num_too_short,
        "without loss": drawn.num_without_loss,
        "duplicates": drawn.num_duplicates,
        "refused by the chat template": len(drawn.refusals),
    }
    left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    asked = "none can be used" if config.num_samples is None else f"{config.num_samples} are asked for"
    name = config.dataset if isinstance(config.dataset, str | Path) else ", ".join(map(str, config.dataset))
    ways = ["ask for fewer samples", "add data"]
    ways += ["choose --too-long split or truncate"] * bool(drawn.num_too_long)
    ways += ["choose --too-short report"] * bool(drawn.num_too_short)
    message = (
        f"{name} gives {len(drawn.samples)} samples out of {len(records)} records"
        f"{f' ({left_out})' if left_out else ''}, but {asked}: {', '.join(ways[:-1])} or {ways[-1]}"
    )
    return "\n".join([message, *(*map(str, drawn.refusals[:1]), *records.notes)[:2]])
