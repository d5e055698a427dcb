"""Ctrl-C and SIGTERM while a model trains: the step is finished, a checkpoint written, the way to go on said."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody asked the training to stop."""

    def __init__(self) -> None:
        self.is_set = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; a second one ends the process's work at once."""
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
        logger.warning("Stopping after this step; a second signal stops at once.")


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Collect Ctrl-C and SIGTERM instead of being ended by them, in the main thread only."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.on_signal) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that what a `finally` cleans is cleaned; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopWithCheckpoint(TrainerCallback):
    """Ends the training after the step in which any process was asked to stop, with a checkpoint if it `saves`.

    Attributes:
        stopped_at: the step after which it was ended, or None.
    """

    def __init__(self, request: StopRequest, *, saves: bool) -> None:
        self.request = request
        self.saves = saves
        self.stopped_at: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._is_requested(args):
            control.should_save = self.saves
            control.should_training_stop = True
            self.stopped_at = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # What is asked for while the last checkpoint is written still ends the run.
        if self.stopped_at is None and self._is_requested(args):
            self.stopped_at = state.global_step

    def _is_requested(self, args: TrainingArguments) -> bool:
        """All processes stop after the same step, though a signal may reach them in different ones."""
        if args.world_size == 1:
            return self.request.is_set
        flag = torch.tensor(float(self.request.is_set), device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
