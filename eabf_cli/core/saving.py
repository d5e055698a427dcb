"""`save_pretrained` of a patched model: what is written loads with the method, or fails loudly."""

from __future__ import annotations

import inspect
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eabf_cli import modeling_eabf
from eabf_cli.core.checkpoint_format import MODELING_FILE, check_can_save, join_config, needs_modeling_file
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.files import read_json, use_default_mode, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNFINISHED = ".eabf-saving"


def save_patched(model: PreTrainedModel, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save a patched model in the form of DESIGN.md section 4; bound to the model as `save_pretrained`.

    transformers writes the weights into a folder of their own inside the target; they move into place
    before `config.json`, which is written last, so that an interrupted save cannot be loaded as a stock
    model with a wrong base and no scale.

    Args:
        kwargs: as for `PreTrainedModel.save_pretrained`, but for `push_to_hub`.

    Raises:
        UnsupportedModelError: no checkpoint form carries this family's scale.
        InvalidConfigError: `push_to_hub=True`.
    """
    resolution = model._eabf_patch.resolution
    check_can_save(resolution.base_config, resolution.scaling)
    if kwargs.pop("push_to_hub", False):
        raise InvalidConfigError("save_pretrained of a patched model does not push: use model.push_to_hub(repo_id)")
    target = Path(save_directory)
    unfinished = target / _UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    # The class's own method: the instance's is this function.
    type(model).save_pretrained(model, unfinished, **kwargs)
    if not kwargs.get("is_main_process", True):
        return
    raw = read_json(unfinished / "config.json")
    base = resolution.base_config
    (target / "config.json").unlink(missing_ok=True)
    (unfinished / "config.json").unlink()
    for stale in target.glob("model*.safetensors*"):
        stale.unlink()
    use_default_mode(unfinished)
    for path in unfinished.iterdir():
        os.replace(path, target / path.name)
    unfinished.rmdir()
    write_scaled_config(target, join_config(raw, base, resolution.scaling), base.model_type, resolution.scaling)


def write_scaled_config(target: Path, config: dict[str, Any], model_type: str, scaling: Any) -> None:
    """Write `config.json`, and before it the modelling file where that is needed."""
    if needs_modeling_file(model_type, scaling):
        copy_modeling_file(target)
    write_json(target / "config.json", config)


def copy_modeling_file(target: Path) -> None:
    """Copy the bundled modelling file, byte for byte."""
    (target / MODELING_FILE).write_bytes(modeling_source())


def modeling_source() -> bytes:
    """The bundled modelling file."""
    return Path(inspect.getfile(modeling_eabf)).read_bytes()
