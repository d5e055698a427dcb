"""Two real optimizer steps at the longest sample: the memory and the time that a run will need."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eabf_cli.core.data.sample_set import Sample, SampleSet
from eabf_cli.core.data.samples import SampleCollator
from eabf_cli.core.devices import peak_memory_gib
from eabf_cli.core.finetune.memory import GIB
from eabf_cli.core.finetune.metrics import read_metrics
from eabf_cli.core.finetune.recipe import Recipe
from eabf_cli.core.finetune.restoration import Restoration
from eabf_cli.core.finetune.settings import TrainSettings
from eabf_cli.core.finetune.training import train

_NUM_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What two steps showed.

    Attributes:
        peak_memory_gib: of the process on a CPU, of its tensors on a GPU.
        seq_len: tokens of the longest sample, which all rows of the probe have.
        seconds_per_step: of one optimizer step with rows of that length.
        expected_s: of the whole run, at the time per token that the longest sample takes in the second step. Shorter
            samples take less for a token; what comes once, such as kernels for rows of other lengths, is not in it.
    """

    peak_memory_gib: float
    seq_len: int
    seconds_per_step: float
    expected_s: float

    @property
    def peak_bytes(self) -> int:
        """`peak_memory_gib` in bytes."""
        return round(self.peak_memory_gib * GIB)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def probe(
    model: PreTrainedModel,
    samples: SampleSet,
    recipe: Recipe,
    *,
    settings: TrainSettings,
    collator: SampleCollator,
    device: torch.device | None = None,
    restoration: Restoration | None = None,
) -> ProbeResult:
    """Train two optimizer steps on the longest sample, as a run would.

    Memory is highest from the second step on, when the optimizer has its moments, and from the second sample of a step
    on, which comes on top of the gradients of the first: more of them hold no more.

    Args:
        model: ready to be trained. It is changed: two steps of training are on it afterwards.
        samples, recipe: of the run.
        device: as for `train`.
        restoration: a loss that is added in every forward pass here; in a run that has it in a share of them, it takes
            as much memory, and less time.
    """
    device = device or next(model.parameters()).device
    longest = max(samples.samples, key=lambda sample: len(sample.input_ids))
    step_samples = min(recipe.batch_size, 2 * settings.micro_batch_size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder:
        train(
            model,
            _repeated(longest, _NUM_STEPS * step_samples),
            replace(recipe, epochs=1, batch_size=step_samples),
            replace(settings, save_steps=None, report_to=()),
            folder=Path(folder),
            collator=collator,
            device=device,
            restoration=restoration,
        )
        # The first step has what comes once: kernels are chosen, memory is asked for.
        last = read_metrics(Path(folder))[-1]
    seconds_per_token = 1 / last["tokens_per_s"]
    seq_len = len(longest.input_ids)
    tokens_per_step = recipe.batch_size * samples.num_tokens / len(samples)
    return ProbeResult(
        peak_memory_gib=peak_memory_gib(device),
        seq_len=seq_len,
        seconds_per_step=recipe.batch_size * seq_len * seconds_per_token,
        expected_s=recipe.num_steps(len(samples)) * tokens_per_step * seconds_per_token,
    )


def _repeated(sample: Sample, number: int) -> SampleSet:
    return SampleSet(samples=(sample,) * number, num_available=number, data_hash="")
