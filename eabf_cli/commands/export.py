"""`eabf export`: write a checkpoint that others can load, verified, and publish it."""

from __future__ import annotations

from typing import Any, get_args

import click

from eabf_cli import options, output
from eabf_cli.core.export.settings import Compat, ExportConfig

_HUB_FIELDS = ("private", "revision", "create_pr", "commit_message", "token", "accept_license")


def _hide_token(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        from eabf_cli.core.export.hub_token import hide_token_argument

        hide_token_argument(value)
    return value


source_options = options.bundle(
    click.option("--source-revision", metavar="REV", help="Branch, tag or commit of a Hub source."),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Let a tokenizer's own code run; with --verify a modelling file's, too.",
    ),
)
form_options = options.bundle(
    click.option(
        "--max-shard-size",
        default=ExportConfig.max_shard_size,
        show_default=True,
        metavar="SIZE",
        help="Of one weight file.",
    ),
    click.option(
        "--compat",
        type=click.Choice(get_args(Compat)),
        help="A form for software that cannot run our code; the difference it makes is measured.",
    ),
    click.option("--verify", is_flag=True, help="Check a folder or a Hub model that exists; write nothing."),
)
hub_options = options.bundle(
    click.option("--to-hub", "repo_id", metavar="OWNER/NAME", help="Publish it on the Hub, in one commit."),
    click.option("--private", is_flag=True, help="Make the repository private."),
    click.option("--revision", metavar="REV", help="Branch to publish on.  [default: the repository's]"),
    click.option("--create-pr", is_flag=True, help="Open a pull request instead."),
    click.option("--commit-message", metavar="TEXT", help="First line of the commit."),
    click.option(
        "--token",
        metavar="TOKEN",
        is_eager=True,
        callback=_hide_token,
        help="Of the Hub. Better set HF_TOKEN: others may see a command line.",
    ),
    click.option("--accept-license", is_flag=True, help="Accept the conditions that the base model's licence sets."),
)


@click.command()
@click.argument("source", required=False)
@source_options
@form_options
@hub_options
@options.compute_options
@options.output_options
@options.common_options
def export(source: str | None, as_json: bool, verify: bool, **values: Any) -> None:
    """Write a checkpoint that anyone can load, verify it, and publish it.

    SOURCE is a run or checkpoint folder, an adapter or a Hub id; without it the newest finished run is taken.
    Adapters are merged. A clean process without eabf loads the result and must give the same logits.

    \b
    Examples:
      eabf export
      eabf export eabf-runs/eabf-tiny-eabf-x4 -o exported --dtype bfloat16
      eabf export --to-hub OWNER/NAME --dry-run
      eabf export eabf-runs/eabf-tiny-eabf-x4 --compat abf -o plain
      eabf export --verify exported
    """
    output.quiet_libraries()
    options.prepare_process(values["device"])
    if verify:
        _verify(source, values, as_json=as_json)
        return
    from eabf_cli.core.export.exporting import export_checkpoint

    hub = _hub_target(values)
    config = ExportConfig(source=source, hub=hub, show_progress=output.is_interactive(), **values)
    result = export_checkpoint(config)
    for message in (*result["warnings"], *result["notes"]):
        output.warn(message)
    output.result(result, _dry_run_text(result) if config.dry_run else _text(result), as_json=as_json)


def _hub_target(values: dict[str, Any]) -> Any:
    """Take the Hub's options out of a command's values, as the core's `HubTarget`; None without `--to-hub`."""
    from eabf_cli.core.export.hub_target import HubTarget

    repo_id, given = values.pop("repo_id"), {name: values.pop(name) for name in _HUB_FIELDS}
    if repo_id is not None:
        return HubTarget(repo_id=repo_id, **given)
    for name, value in given.items():
        if value:
            raise click.UsageError(f"--{name.replace('_', '-')} belongs to --to-hub OWNER/NAME")
    return None


def _verify(source: str | None, values: dict[str, Any], *, as_json: bool) -> None:
    from eabf_cli.core.export.verification import verify_existing

    if source is None:
        raise click.UsageError("--verify needs a folder or a Hub id: eabf export --verify exported")
    context = click.get_current_context()
    known = ("source_revision", "trust_remote_code", "device", "seed")
    for name in values:
        if name not in known and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            flag = "to-hub" if name == "repo_id" else name.replace("_", "-")
            raise click.UsageError(f"--{flag} has no meaning with --verify, which writes nothing")
    result = verify_existing(
        source,
        revision=values["source_revision"],
        trust_remote_code=values["trust_remote_code"],
        device=values["device"],
        seed=values["seed"],
    )
    output.result(result, "\n".join(_verification_lines(source, result)), as_json=as_json)


def _text(result: dict[str, Any]) -> str:
    lines = [_method_line(result), *_verification_lines(result["output"], result)]
    if result["compat"] is not None:
        lines.append(result["compat"]["summary"])
    total = sum(file["bytes"] for file in result["files"])
    lines.append(f"Written to {result['output']}: {len(result['files'])} files, {_size(total)}")
    if result["commit_url"] is not None:
        lines.append(f"Published as {result['repo_id']}: {result['commit_url']}")
    return "\n".join(lines)


def _method_line(result: dict[str, Any]) -> str:
    return (
        f"{result['source']}: {result['method']}, window {result['original_max_position_embeddings']:,} -> "
        f"{result['max_position_embeddings']:,} tokens, rope_theta {result['rope_theta']:,.0f}"
    )


def _verification_lines(name: str, result: dict[str, Any]) -> list[str]:
    verification = result["verification"]
    lengths = ", ".join(f"{length:,}" for length in verification["lengths"])
    lines = [
        f"Verified {name} in a clean process: logits differ by at most {result['verified']:.2g} "
        f"(up to {verification['tolerance']:.2g} passes) on rows of {lengths} tokens"
    ]
    lines += [f"  {check}: {found}" for check, found in verification["checks"].items()]
    return [*lines, *(f"  not checked: {note}" for note in verification["notes"])]


def _dry_run_text(result: dict[str, Any]) -> str:
    lines = [_method_line(result), f"Would be written to {result['planned_output']}:"]
    width = max(len(file["name"]) for file in result["files"])
    lines += [f"  {file['name']:<{width}}  {_size(file['bytes'])}".rstrip() for file in result["files"]]
    if not any(file["name"].endswith(".safetensors") for file in result["files"]):
        lines.append("  and the weights, which a dry run does not fetch or load")
    if result["changes"]:
        width = max(map(len, result["changes"]))
        lines.append("config.json would change:")
        lines += [
            f"  {name:<{width}}  {_short(old)} -> {_short(new)}" for name, (old, new) in result["changes"].items()
        ]
    if result["repo_id"] is not None:
        lines.append(f"All of it would go to {result['repo_id']} on the Hub, in one commit.")
    return "\n".join([*lines, "Nothing was written (--dry-run)."])


def _short(value: Any) -> str:
    return "(absent)" if value is None else str(value)


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return ""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"
