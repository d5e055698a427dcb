"""Options that several commands share, each declared once; defaults come from the core's configs."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from eabf_cli import output
from eabf_cli.core.data.samples import DataConfig, TooLong
from eabf_cli.core.demo import DEMO_MODEL
from eabf_cli.core.devices import DTYPES
from eabf_cli.core.finetune.recipe import PRESET_NAMES, Recipe
from eabf_cli.core.finetune.settings import TUNING_NAMES
from eabf_cli.core.methods import METHODS
from eabf_cli.core.scaling_config import THETA_RULES, RopeScalingConfig

_METHOD_NAMES = [*METHODS, *(alias for method in METHODS.values() for alias in method.aliases)]

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class IntegerList(click.ParamType):
    """Whole numbers separated by commas; with `none_word`, that word stands for the empty list."""

    name = "list"

    def __init__(self, none_word: str | None = None) -> None:
        self.none_word = none_word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if value == self.none_word:
            return ()
        # A settings file gives a list as such.
        parts = value if isinstance(value, list | tuple) else str(value).split(",")
        try:
            return tuple(int(str(part)) for part in parts)
        except ValueError:
            alternative = f" or {self.none_word!r}" if self.none_word else ""
            self.fail(f"{value!r} is no comma-separated list of whole numbers{alternative}", param, ctx)


class NameList(click.ParamType):
    """Words separated by commas."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        parts = value if isinstance(value, list | tuple) else str(value).split(",")
        names = tuple(part.strip() for part in map(str, parts))
        if not all(names):
            self.fail(f"{value!r} is no comma-separated list of names", param, ctx)
        return names


class NumberList(click.ParamType):
    """Numbers separated by commas."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        parts = value if isinstance(value, list | tuple) else str(value).split(",")
        try:
            return tuple(float(part) for part in parts)
        except ValueError:
            self.fail(f"{value!r} is no comma-separated list of numbers", param, ctx)


class RopeTheta(click.ParamType):
    """A number or the name of a rule."""

    name = "number|" + "|".join(THETA_RULES)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value in THETA_RULES:
            return value
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor one of {', '.join(THETA_RULES)}", param, ctx)


def bundle(*options: Decorator) -> Decorator:
    """One decorator from several, in the order in which help shows them."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _read_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Make a TOML file's values this command's defaults, so that flags win."""
    if value is None:
        return None
    try:
        values = tomllib.loads(value.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{value} cannot be read as TOML: {error}", ctx, param) from error
    names = {name for option in ctx.command.params for name in _config_names(option)}
    values = {name.replace("-", "_"): entry for name, entry in values.items()}
    unknown = sorted(set(values) - names)
    if unknown:
        raise click.BadParameter(
            f"{value} sets {', '.join(unknown)}, which {ctx.command.name} does not know; "
            f"known: {', '.join(sorted(names))}",
            ctx,
            param,
        )
    by_parameter = {
        option.name: _as_default(option, values[name])
        for option in ctx.command.params
        for name in _config_names(option)
        if name in values
    }
    ctx.default_map = {**(ctx.default_map or {}), **by_parameter}
    return value


def _as_default(option: click.Parameter, value: Any) -> Any:
    """A repeatable option's default is a list, though a file may give one value as it is."""
    return [value] if getattr(option, "multiple", False) and not isinstance(value, list) else value


def _config_names(option: click.Parameter) -> set[str]:
    """The names by which a file may set an option: its long flags."""
    return {flag.removeprefix("--").replace("-", "_") for flag in option.opts if flag.startswith("--")}


def _set_verbosity(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    ctx.meta[f"eabf.{param.name}"] = value
    output.set_verbosity(quiet=ctx.meta.get("eabf.quiet", False), verbose=ctx.meta.get("eabf.verbose", False))
    return value


def model_options_for(default: str) -> Decorator:
    """The options that name a model; help shows what is used when none is named."""

    def refuse_local(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        model = ctx.params["model"] or default
        is_typed = ctx.get_parameter_source("revision") is ParameterSource.COMMANDLINE
        if is_typed and (model == DEMO_MODEL or Path(model).expanduser().exists()):
            raise click.UsageError(f"--revision belongs to a model of the Hub, and --model {model} is none", ctx)
        return value

    return bundle(
        click.option(
            "-m",
            "--model",
            metavar="ID_OR_PATH",
            # Before --revision, which depends on it.
            is_eager=True,
            help=f"Hub id, folder, GGUF file, or {DEMO_MODEL}.  [default: {default}]",
        ),
        click.option(
            "--revision",
            metavar="REV",
            callback=refuse_local,
            help="Branch, tag or commit of a Hub model.",
        ),
        click.option("--trust-remote-code", is_flag=True, help="Let a tokenizer's own code run."),
    )


def method_options_for(
    *,
    method: str | None = RopeScalingConfig.method,
    default_factor: str = "",
    default_theta: str = "the larger of paper and auto",
) -> Decorator:
    """The options that describe a method.

    Args:
        method: the default; None applies no method unless one is named.
        default_factor, default_theta: what help says is used when none is given.
    """
    default_factor = default_factor or f"{RopeScalingConfig.factor:g}"
    return bundle(
        click.option(
            "--method",
            type=click.Choice(_METHOD_NAMES),
            default=method,
            show_default=method is not None,
            help="How to extend the window." + ("" if method else "  [default: the model as it stands]"),
        ),
        click.option(
            "--factor",
            type=float,
            help=f"Target window divided by the pre-trained one.  [default: {default_factor}]",
        ),
        click.option("--max-length", type=int, metavar="TOKENS", help="Target window (instead of --factor)."),
        click.option("--rope-theta", type=RopeTheta(), help=f"Base frequency.  [default: {default_theta}]"),
        click.option("--original-length", type=int, metavar="TOKENS", help="Pre-trained window, if not the model's."),
        click.option("--rebase", is_flag=True, help="Take an existing scaling off the model first."),
        click.option(
            "--unscaled-layers",
            type=IntegerList(none_word="none"),
            metavar="LIST|none",
            help="Layers whose logits are not scaled.  [default: 0,1 for eabf]",
        ),
    )


too_long_option = click.option(
    "--too-long",
    type=click.Choice(get_args(TooLong)),
    default=DataConfig.too_long,
    show_default=True,
    help="What to do with samples longer than the target window.",
)
preset_option = click.option(
    "--preset",
    type=click.Choice(PRESET_NAMES),
    default="auto",
    show_default=True,
    help="Where the recipe comes from: scaled to the model's size, or as published.",
)
learning_rate_option = click.option("--learning-rate", type=float, help="Peak learning rate.  [default: the preset's]")
epochs_option = click.option("--epochs", type=int, help=f"Passes over the samples.  [default: {Recipe.epochs}]")
tuning_option = click.option(
    "--tuning",
    type=click.Choice(TUNING_NAMES),
    default="auto",
    show_default=True,
    help="All weights, adapters, adapters on a 4-bit model, or the first of these that fits.",
)
model_options = model_options_for(DEMO_MODEL)
method_options = method_options_for()
optional_method_options = method_options_for(method=None)
compute_options = bundle(
    click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Weights' dtype."),
    click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]|mps", help="Where to run."),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**32 - 1),
        default=42,
        show_default=True,
        metavar="INTEGER",
        help="Seed of everything random.",
    ),
)
output_options = bundle(
    click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Where to write."),
    click.option("--overwrite", is_flag=True, help="Replace an output that exists."),
    click.option("--dry-run", is_flag=True, help="Show what would be done; write nothing."),
)
common_options = bundle(
    click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        metavar="FILE",
        help="TOML file with options (flags win).",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout."),
    click.option("-q", "--quiet", is_flag=True, expose_value=False, is_eager=True, callback=_set_verbosity),
    click.option("-v", "--verbose", is_flag=True, expose_value=False, is_eager=True, callback=_set_verbosity),
)


def model_or_demo(model: str | None) -> str:
    """The model to use; without one the demo model, which is said."""
    if model is None:
        output.status(f"No --model given: using the demo model {DEMO_MODEL}. Name a real one with -m ID_OR_PATH.")
        return DEMO_MODEL
    return model


def prepare_process(device: str) -> None:
    """What a command that computes does first.

    Raises:
        InvalidConfigError: an unknown device, or one that is not there.
    """
    from eabf_cli.core.allocator import keep_freed_memory, limit_kept_kernels
    from eabf_cli.core.devices import choose_device

    if choose_device(device).type == "cpu":
        keep_freed_memory()
        limit_kept_kernels()


def typed_flags(ctx: click.Context, names: Iterable[str]) -> list[str]:
    """Those of some options that were typed, as they are typed; a settings file may hold more than a run needs."""
    flags = {param.name: param for param in ctx.command.params}
    return [
        max(flags[name].secondary_opts if ctx.params[name] is False else flags[name].opts, key=len)
        for name in names
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]


METHOD_FIELDS = ("method", "factor", "max_length", "rope_theta", "original_length", "rebase", "unscaled_layers")


def method_request(values: dict[str, Any]) -> Any:
    """Take the shared method options out of a command's values, as the core's `MethodRequest`; None without method."""
    from eabf_cli.core.method_request import MethodRequest

    given = {name: values.pop(name) for name in METHOD_FIELDS}
    if given["method"] is not None:
        return MethodRequest(**given)
    for name, value in given.items():
        if value is not None and value is not False:
            raise click.UsageError(f"--{name.replace('_', '-')} belongs to a method: name one with --method")
    return None


def wanted_extension(values: dict[str, Any]) -> Any:
    """What the shared method options say of an extension that is not applied yet; the default method without one."""
    from eabf_cli.core.method_request import MethodRequest

    return MethodRequest(**{name: values[name] for name in METHOD_FIELDS if values[name] is not None})
