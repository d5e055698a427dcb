"""Devices by name: the ones that are there are taken, others refused with those that are."""

from __future__ import annotations

import pytest
import torch

from eabf_cli.core.devices import choose_device
from eabf_cli.core.errors import InvalidConfigError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Lets torch see some GPUs, and Apple's or not."""
    num_gpus, has_mps = request.param
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("machine", "names"),
    [
        ((0, False), {"cpu": "cpu", "auto": "cpu"}),
        ((2, False), {"cpu": "cpu", "cuda": "cuda", "cuda:0": "cuda:0", "cuda:1": "cuda:1", "auto": "cuda:0"}),
        ((12, False), {"cuda:11": "cuda:11"}),
        ((0, True), {"cpu": "cpu", "mps": "mps", "auto": "mps"}),
    ],
    indirect=["machine"],
)
def test_a_device_that_is_there_is_taken(names: dict[str, str]) -> None:
    assert {name: choose_device(name) for name in names} == {name: torch.device(to) for name, to in names.items()}


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("machine", "name", "there"),
    [
        ((0, False), "cuda", "cpu"),
        ((0, False), "cuda:1", "cpu"),
        ((0, False), "mps", "cpu"),
        ((1, False), "cuda:1", "cpu, cuda:0"),
        ((2, False), "cuda:2", "cpu, cuda:0, cuda:1"),
        ((0, True), "cuda:0", "cpu, mps"),
    ],
    indirect=["machine"],
)
def test_one_that_is_absent_is_refused_with_those_that_are_there(name: str, there: str) -> None:
    with pytest.raises(InvalidConfigError) as refused:
        choose_device(name)
    assert str(refused.value) == f"device {name!r} is not on this machine, which has {there}"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:1234", "CUDA", "cpu:0", "xpu", "meta", ""])
def test_what_is_no_device_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(InvalidConfigError, match=r"unknown device .*known: auto, cpu, cuda, cuda:N, mps"):
        choose_device(name)
