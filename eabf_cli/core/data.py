"""Training samples: drawn by seed from a dataset, tokenised, fitted to a length, counted and hashed."""

from __future__ import annotations

import hashlib
import random
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from eabf_cli.core.demo import DEMO_DATASET
from eabf_cli.core.errors import DataError, InvalidConfigError
from eabf_cli.core.records import Record, RecordReader, open_records
from eabf_cli.core.tokenization import TokenizedText, encode_chat, encode_text

IGNORE_INDEX = -100
"""The label of a token without loss, as torch's cross entropy and transformers have it."""

NUM_SAMPLES = 100
"""How many samples the paper is content with."""

TooLong = Literal["error", "truncate", "drop", "split"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples to train on.

    Attributes:
        dataset: `demo-long`, a JSONL file, text files, a folder of them, a Hub dataset id, or a
            list of these.
        dataset_split: split of a Hub dataset (default `train`) or of `demo-long` (`train`, `heldout`).
        revision: revision of a Hub dataset.
        num_samples: how many samples to draw; None takes all.
        max_length: tokens per sample at most, begin-of-sequence included.
        too_long: what happens to a longer one: "error" stops, "truncate" keeps its beginning, "drop" draws
            another instead, "split" cuts it into samples of `max_length` and a shorter rest.
        seed: decides which samples are drawn, and their order.

    Raises:
        InvalidConfigError: a number below its least value, or an unknown `too_long`.
    """

    dataset: str | Path | Sequence[str | Path] = DEMO_DATASET
    dataset_split: str | None = None
    revision: str | None = None
    num_samples: int | None = NUM_SAMPLES
    max_length: int = 2048
    too_long: TooLong = "error"
    seed: int = 42

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise InvalidConfigError(f"num_samples must be at least 1, got {self.num_samples}")
        if self.max_length < 2:
            raise InvalidConfigError(
                f"max_length must be at least 2 tokens (one to see, one to predict), got {self.max_length}"
            )
        if self.too_long not in get_args(TooLong):
            raise InvalidConfigError(f"too_long must be one of {', '.join(get_args(TooLong))}, got {self.too_long!r}")


@dataclass(frozen=True)
class Sample:
    """One training row: token ids, and labels of the same length, `IGNORE_INDEX` where there is no loss."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """The drawn samples and what was done to get them; a map-style dataset for torch and for `Trainer`.

    Attributes:
        samples: the samples in training order.
        num_available: records in the dataset.
        data_hash: sha256 of the token ids and labels of all samples, in order, independent of the platform.
        num_truncated: samples that lost their end.
        num_dropped: records (or pieces) left out: too long under "drop", or no loss left within `max_length`.
        num_split: records that were cut into several samples.
    """

    samples: tuple[Sample, ...]
    num_available: int
    data_hash: str
    num_truncated: int = 0
    num_dropped: int = 0
    num_split: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        sample = self.samples[index]
        return {"input_ids": sample.input_ids, "labels": sample.labels}

    @property
    def num_tokens(self) -> int:
        """Tokens in all samples together."""
        return sum(len(sample.input_ids) for sample in self.samples)

    @property
    def tokens_per_sample(self) -> dict[str, int]:
        """Smallest, median and largest sample, in tokens."""
        lengths = [len(sample.input_ids) for sample in self.samples]
        return {"min": min(lengths), "median": round(median(lengths)), "max": max(lengths)}

    def summary(self) -> dict[str, Any]:
        """What a run record says about its data, ready for JSON."""
        return {
            "num_samples": len(self),
            "num_available": self.num_available,
            "num_tokens": self.num_tokens,
            "tokens_per_sample": self.tokens_per_sample,
            "num_truncated": self.num_truncated,
            "num_dropped": self.num_dropped,
            "num_split": self.num_split,
            "data_hash": self.data_hash,
        }


def load_samples(config: DataConfig, tokenizer: Any) -> SampleSet:
    """Draw, tokenise and fit the samples that a config asks for.

    The same config, files and tokenizer give the same samples in every process. Documents have loss on all
    tokens, conversations on the assistant's turns (`eabf_cli.core.tokenization`).

    Raises:
        DataError: the dataset is missing or malformed, holds fewer samples than asked for, or a sample is too
            long and `too_long` is "error".
    """
    readers = open_records(config.dataset, split=config.dataset_split, revision=config.revision)
    drawn = _Drawn(config, tokenizer)
    rng = random.Random(config.seed)
    # Splitting draws all pieces of the records it opens and picks among them afterwards, or a single book
    # would always be trained on from its first page.
    for reader in rng.sample(readers, len(readers)):
        if config.num_samples is not None and len(drawn.samples) >= config.num_samples:
            break
        drawn.add(reader())
    samples = drawn.samples
    wanted = len(samples) if config.num_samples is None else config.num_samples
    if len(samples) < wanted or not samples:
        raise DataError(_too_few(config, len(samples), readers, drawn))
    if config.too_long == "split":
        samples = rng.sample(samples, wanted)
    return SampleSet(
        samples=tuple(samples),
        num_available=len(readers),
        data_hash=_hash_samples(samples),
        num_truncated=drawn.num_truncated,
        num_dropped=drawn.num_dropped,
        num_split=drawn.num_split,
    )


@dataclass(frozen=True)
class SampleCollator:
    """Makes a batch of samples: padded on the right to the longest, without loss on the padding.

    Attributes:
        pad_token_id: any valid token id; it is masked and has no loss.
    """

    pad_token_id: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> SampleCollator:
        """Pad with the tokenizer's padding token, else its end of sequence, else token 0."""
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        return cls(next((token for token in candidates if token is not None), 0))

    def __call__(self, samples: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        """Tensors `input_ids`, `labels` and `attention_mask`, each (batch, longest sample), int64."""
        import torch

        longest = max(len(sample["input_ids"]) for sample in samples)
        padding = [longest - len(sample["input_ids"]) for sample in samples]
        columns = {
            "input_ids": [s["input_ids"] + [self.pad_token_id] * n for s, n in zip(samples, padding, strict=True)],
            "labels": [s["labels"] + [IGNORE_INDEX] * n for s, n in zip(samples, padding, strict=True)],
            "attention_mask": [[1] * (longest - n) + [0] * n for n in padding],
        }
        return {name: torch.tensor(rows, dtype=torch.long) for name, rows in columns.items()}


class _Drawn:
    """Samples fitted so far, and the counts of what was done to them."""

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.samples: list[Sample] = []
        self.num_truncated = self.num_dropped = self.num_split = 0

    def add(self, record: Record) -> None:
        max_length, too_long = self.config.max_length, self.config.too_long
        tokens = _encode(self.tokenizer, record, None if too_long == "split" else max_length)
        if len(tokens.input_ids) <= max_length:
            self._keep(tokens.input_ids, tokens.has_loss)
        elif too_long == "error":
            raise DataError(_describe_too_long(record, tokens, self.config))
        elif too_long == "drop":
            self.num_dropped += 1
        elif too_long == "truncate":
            self.num_truncated += self._keep(tokens.input_ids[:max_length], tokens.has_loss[:max_length])
        else:
            self.num_split += 1
            self._split(tokens)

    def _split(self, tokens: TokenizedText) -> None:
        """Consecutive pieces; each begins with BOS, since models are out of their distribution without it."""
        bos = self.tokenizer.bos_token_id
        ids, has_loss = tokens.input_ids, tokens.has_loss
        start = [] if bos is None or ids[0] != bos else [bos]
        ids, has_loss = ids[len(start) :], has_loss[len(start) :]
        size = self.config.max_length - len(start)
        for begin in range(0, len(ids), size):
            self._keep(start + ids[begin : begin + size], [False] * len(start) + has_loss[begin : begin + size])

    def _keep(self, input_ids: list[int], has_loss: list[bool]) -> bool:
        # The first token is never predicted.
        if not any(has_loss[1:]):
            self.num_dropped += 1
            return False
        labels = [token if loss else IGNORE_INDEX for token, loss in zip(input_ids, has_loss, strict=True)]
        self.samples.append(Sample(input_ids, labels))
        return True


def _encode(tokenizer: Any, record: Record, max_tokens: int | None) -> TokenizedText:
    if record.text is not None:
        return encode_text(tokenizer, record.text, max_tokens=max_tokens)
    return encode_chat(tokenizer, record.messages, record.origin, max_tokens=max_tokens)


def _describe_too_long(record: Record, tokens: TokenizedText, config: DataConfig) -> str:
    length = f"{len(tokens.input_ids):,}" if tokens.is_whole else f"more than {len(tokens.input_ids):,}"
    return (
        f"{record.origin}: the sample has {length} tokens, more than max_length {config.max_length:,}: "
        "raise the target window, or have long samples handled by too_long truncate, drop or split"
    )


def _too_few(config: DataConfig, num_usable: int, readers: Sequence[RecordReader], drawn: _Drawn) -> str:
    dropped = f" ({drawn.num_dropped} dropped)" if drawn.num_dropped else ""
    asked = "none can be used" if config.num_samples is None else f"{config.num_samples} are asked for"
    name = config.dataset if isinstance(config.dataset, str | Path) else ", ".join(map(str, config.dataset))
    return (
        f"{name} gives {num_usable} samples out of {len(readers)} records{dropped}, but {asked}: "
        "ask for fewer samples, add data, or choose too_long split or truncate"
    )


def _hash_samples(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        # Lengths in between, so that the same tokens in other samples hash differently.
        for values in ([len(sample.input_ids)], sample.input_ids, sample.labels):
            digest.update(_int64_bytes(values))
    return digest.hexdigest()


def _int64_bytes(values: Sequence[int]) -> bytes:
    data = array("q", values)
    if sys.byteorder == "big":
        data.byteswap()
    return data.tobytes()
