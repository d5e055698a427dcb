"""What report pages share stands in one sheet."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from eabf_cli.core.pages import page_style, template_file

SHEETS = {
    "base": ("eabf_cli.core", "base.css"),
    "entropy": ("eabf_cli.core.entropy", "report.css"),
    "evals": ("eabf_cli.core.evals", "report.css"),
}


def rules(sheet: str) -> set[tuple[str, str]]:
    """Selectors with what they set, wherever they stand."""
    found = re.findall(
        r"([^{}]+)\{([^{}]*)\}", re.sub(r"/\*.*?\*/", "", template_file(*SHEETS[sheet]), flags=re.DOTALL)
    )
    return {(" ".join(selector.split()), " ".join(body.split())) for selector, body in found}


@pytest.mark.parametrize(("first", "second"), list(combinations(SHEETS, 2)))
def test_no_rule_stands_in_two_sheets(first: str, second: str) -> None:
    assert rules(first) & rules(second) == set()


@pytest.mark.parametrize("package", ["eabf_cli.core.entropy", "eabf_cli.core.evals"])
def test_a_page_s_own_rules_come_after_the_shared_ones_and_define_the_colours_those_use(package: str) -> None:
    style = page_style(package)
    assert style.startswith(template_file("eabf_cli.core", "base.css"))
    assert style.endswith(template_file(package, "report.css"))
    assert set(re.findall(r"var\((--(?!share|light|dark)[a-z]+)\)", style)) <= set(re.findall(r"(--[a-z]+):", style))
