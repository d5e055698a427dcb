"""The training recipe: the paper's numbers, the rule between its two sizes, and what it refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.finetune.recipe import Recipe, recipe_for, scaled_learning_rate


def test_the_paper_s_100_samples_are_6_steps() -> None:
    recipe = recipe_for(6_738_415_616, 100)
    assert (recipe.learning_rate, recipe.epochs, recipe.batch_size, recipe.warmup_steps) == (2e-5, 2, 32, 0)
    assert (recipe.adam_beta1, recipe.adam_beta2, recipe.weight_decay) == (0.9, 0.95, 0.1)
    assert recipe.num_steps(100) == 6


@pytest.mark.parametrize(
    ("num_parameters", "learning_rate"),
    [(5_400_000, 3e-4), (1_000, 3e-4), (6_700_000_000, 2e-5), (70_000_000_000, 2e-5)],
)
def test_the_learning_rate_is_known_at_both_sizes_and_held_beyond(num_parameters: int, learning_rate: float) -> None:
    assert scaled_learning_rate(num_parameters) == learning_rate


def test_the_learning_rate_lies_on_the_line_between_them() -> None:
    # Halfway in the logarithm of the size is halfway in that of the rate: sqrt(3e-4 x 2e-5) at sqrt(5.4e6 x 6.7e9).
    assert scaled_learning_rate(190_210_000) == pytest.approx(7.7e-5, rel=0.02)


@given(st.integers(10**6, 10**11), st.integers(10**6, 10**11))
def test_a_larger_model_never_learns_faster(a: int, b: int) -> None:
    assert scaled_learning_rate(max(a, b)) <= scaled_learning_rate(min(a, b))


@pytest.mark.parametrize(
    ("num_parameters", "num_samples", "batch_size"),
    [(5_400_000, 100, 4), (99_999_999, 100, 4), (100_000_000, 100, 32), (7_000_000_000, 10, 10), (5_400_000, 3, 3)],
)
def test_the_batch_follows_the_size_and_is_never_larger_than_the_samples(
    num_parameters: int, num_samples: int, batch_size: int
) -> None:
    assert recipe_for(num_parameters, num_samples).batch_size == batch_size


def test_given_values_win() -> None:
    recipe = recipe_for(7_000_000_000, 100, learning_rate=1e-3, epochs=5, batch_size=7)
    assert (recipe.learning_rate, recipe.epochs, recipe.batch_size) == (1e-3, 5, 7)
    assert recipe.num_steps(100) == 5 * 14


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch_size": 101}, ["101", "100 samples", "--batch-size"]),
        ({"batch_size": 0}, ["--batch-size", "0"]),
        ({"epochs": 0}, ["--epochs", "0"]),
        ({"learning_rate": 0.0}, ["--learning-rate", "0.0"]),
        ({"learning_rate": 1.0}, ["--learning-rate", "1.0"]),
        ({"learning_rate": float("nan")}, ["--learning-rate", "nan"]),
    ],
)
def test_nonsense_is_refused_by_name_and_value(fields: dict[str, float], said: list[str]) -> None:
    with pytest.raises(InvalidConfigError) as error:
        recipe_for(7_000_000_000, 100, **fields)  # type: ignore[arg-type]
    assert [word for word in said if word not in str(error.value)] == []


@given(epochs=st.integers(1, 5), batch_size=st.integers(1, 40), num_samples=st.integers(1, 200))
def test_steps_are_whole_batches_of_each_epoch(epochs: int, batch_size: int, num_samples: int) -> None:
    steps = Recipe(epochs=epochs, batch_size=batch_size).num_steps(num_samples)
    per_epoch, rest = divmod(steps, epochs)
    assert rest == 0
    assert per_epoch * batch_size <= num_samples < (per_epoch + 1) * batch_size
