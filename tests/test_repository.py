"""What holds for the repository as a whole: what is in it, and who imports whom."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "eabf_cli"
MAX_BYTES = 2_000_000
ALLOWED_LARGE = ("eabf_cli/demo/eabf-tiny/model.safetensors",)
# Home folders, and the folders of the machines that the project is built on.
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:root|home|Users|work|opt)/\w")


@cache
def repository_files() -> tuple[str, ...]:
    """Files that git has or would add; paths relative to the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return tuple(name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).is_file())


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


CORE_FILES = sorted((PACKAGE / "core").rglob("*.py"))


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: path.name)
def test_core_knows_no_command_line(path: Path) -> None:
    forbidden = ("click", "eabf_cli.commands", "eabf_cli.options", "eabf_cli.output", "eabf_cli.cli")
    assert not [module for module in imported_modules(path) for name in forbidden if is_within(module, name)]


@pytest.mark.parametrize("path", sorted((PACKAGE / "commands").glob("[a-z]*.py")), ids=lambda path: path.name)
def test_commands_do_not_import_each_other(path: Path) -> None:
    assert not [module for module in imported_modules(path) if is_within(module, "eabf_cli.commands")]


def test_the_modelling_file_stands_alone() -> None:
    imported = imported_modules(PACKAGE / "modeling_eabf.py")
    roots = {module.partition(".")[0] for module in imported}
    assert roots - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_help_loads_neither_torch_nor_transformers() -> None:
    script = """
import json, resource, sys
sys.argv = ["eabf", "--help"]
from eabf_cli.cli import main
main(standalone_mode=False)
seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime
print(json.dumps({"modules": sorted(sys.modules), "user_s": seconds}), file=sys.stderr)
"""
    runs = [
        subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert "Usage: eabf" in runs[0].stdout
    reports = [json.loads(run.stderr) for run in runs]
    # Shown by `pytest -s` or on failure; a busy machine is no reason to fail.
    print(f"eabf --help: {min(report['user_s'] for report in reports):.2f} s of CPU, best of 3")
    loaded = {module.partition(".")[0] for module in reports[0]["modules"]}
    assert "click" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "datasets", "matplotlib", "huggingface_hub"}


def test_no_large_files() -> None:
    large = [name for name in repository_files() if (REPOSITORY / name).stat().st_size > MAX_BYTES]
    assert set(large) <= set(ALLOWED_LARGE)


def test_no_machine_paths() -> None:
    named = []
    for name in repository_files():
        content = (REPOSITORY / name).read_bytes()
        if b"\0" in content or name == "tests/test_repository.py":
            continue
        named += [f"{name}: {match[0]}" for match in MACHINE_PATH.finditer(content.decode("utf-8"))]
    assert not named


def test_no_leftovers() -> None:
    """Work in progress is marked elsewhere than in the tree."""
    marker = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
    suffixes = (".py", ".md", ".toml", ".txt")
    texts = {
        name: (REPOSITORY / name).read_text(encoding="utf-8") for name in repository_files() if name.endswith(suffixes)
    }
    assert not [name for name, text in texts.items() if marker.search(text) and name != "tests/test_repository.py"]


def test_licence_is_the_one_that_is_declared() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    licence = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence


def test_changelog_has_this_version() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"\n## [{project['version']}]" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_dependency_is_pinned_for_ci() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = {
        re.match(r"[\w-]+", entry)[0]  # type: ignore[index]
        for entry in project["dependencies"] + extras["dev"] + extras["docs"]
    }
    pinned = set(re.findall(r"^([\w-]+)==", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert wanted <= pinned
