"""``docs/reliability.md`` is the tree's: every fault has tests, which exist, and no test of a fault is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = range(1, 31)

_DEFINED = re.compile(r"^\s*def (test_\w+)\(", re.M)
_PLACE = re.compile(r"^- `(tests/[\w/]+\.py)`: ((?:`test_\w+`(?:, )?)+)$", re.M)


def names_in(file: Path) -> set[str]:
    return set(_DEFINED.findall(file.read_text(encoding="utf-8")))


def section(row: int) -> str:
    """What the page says of the tests of a row."""
    found = re.search(rf"^### {row}\. .*?(?=^##|\Z)", PAGE, re.M | re.S)
    assert found is not None, f"no section for row {row}"
    return found[0]


def listed(text: str) -> set[tuple[str, str]]:
    """(file, test) of a section."""
    return {(file, name) for file, names in _PLACE.findall(text) for name in re.findall(r"test_\w+", names)}


def in_tree() -> set[tuple[str, str]]:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    found = {(str(file.relative_to(ROOT)), name) for file in files for name in names_in(file)}
    return {(file, name) for file, name in found if re.match(r"test_r\d\d_", name)}


@pytest.mark.parametrize("row", ROWS)
def test_every_fault_has_a_promise_and_tests(row: int) -> None:
    cells = re.findall(rf"^\| {row} \| (.+?) \| (.+?) \| (.+?) \|$", PAGE, re.M)
    assert len(cells) == 1
    tests = listed(section(row))
    assert tests
    assert tests == {(file, name) for file, name in in_tree() if name.startswith(f"test_r{row:02}_")}
    assert f"### {row}. {cells[0][0]}\n" in PAGE  # the same fault


def test_every_test_that_the_page_names_exists() -> None:
    named = listed(PAGE)
    assert len(named) > 100
    assert {name for _, name in named} == set(re.findall(r"`(test_\w+)`", PAGE))
    for file, name in sorted(named):
        assert name in names_in(ROOT / file), f"{file}: {name}"


def test_no_test_of_a_fault_has_a_number_beyond_the_rows() -> None:
    assert {int(name[6:8]) for _, name in in_tree()} == set(ROWS)
