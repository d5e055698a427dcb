"""Messages name the option that a user types, not the field behind it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from eabf_cli.commands.finetune import finetune
from eabf_cli.core.data.samples import DataConfig
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.finetune.plan import FinetuneConfig
from eabf_cli.core.finetune.recipe import Recipe
from eabf_cli.core.finetune.settings import LoraSettings, RestorationConfig
from eabf_cli.core.option_names import check_at_least_one


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (FinetuneConfig, {"samples": 0}),
        (FinetuneConfig, {"micro_batch_size": 0}),
        (FinetuneConfig, {"save_steps": -1}),
        (DataConfig, {"num_samples": 0}),
        (DataConfig, {"too_long": "cut"}),
        (Recipe, {"epochs": 0}),
        (Recipe, {"batch_size": 0}),
        (Recipe, {"learning_rate": 2.0}),
        (LoraSettings, {"rank": 0}),
        (LoraSettings, {"alpha": -1.5}),
        (RestorationConfig, {"weight": -1.0}),
        (RestorationConfig, {"share": 1.5}),
    ],
)
def test_a_refused_number_is_told_under_an_option_of_finetune(config: type, values: dict[str, object]) -> None:
    with pytest.raises(InvalidConfigError) as error:
        config(**values)
    known = {flag for option in finetune.params for flag in option.opts}
    assert str(error.value).split()[0] in known
    assert str(next(iter(values.values()))) in str(error.value)


def test_a_number_that_is_not_given_is_not_refused() -> None:
    @dataclass
    class Config:
        save_steps: int | None = None

    check_at_least_one(Config(), "save_steps")
    check_at_least_one(Config(1), "save_steps")
