"""Row 13: tests that let a wrong kernel through would prove nothing, so wrong kernels are given to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenfab
from tokenfab.tests.reliability.mutants import MUTANTS, TESTS_FAILED, Mutant, copy_package, mutated

SOURCE = Path(tokenfab.__file__).resolve().parent


def test_r13_weak_tests(tmp_path: Path) -> None:
    """The tests pass on the kernels as they are, and fail on each mutant."""
    package = copy_package(SOURCE, tmp_path)
    path = os.pathsep.join((str(tmp_path), str(package / "tests" / "support"), *sys.path))
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("mutants.py")), str(package)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    plain, *statuses = [json.loads(line) for line in child.stdout.splitlines()]
    assert plain == {"fault": "", "status": 0}
    assert statuses == [{"fault": mutant.fault, "status": TESTS_FAILED} for mutant in MUTANTS]


def test_r13_mutants_are_of_several_kinds() -> None:
    assert len(MUTANTS) >= 8
    assert len({mutant.file for mutant in MUTANTS}) >= 8
    for kind in ("x1.2 scale", "nibble swap", "lost K tail", "dropped expert", "window edge", "sink", "gate", "page"):
        assert any(kind in mutant.fault for mutant in MUTANTS), kind


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_r13_a_mutant_stands_once_in_its_file(mutant: Mutant) -> None:
    text = (SOURCE / "kernels" / mutant.file).read_text()
    assert mutated(text, mutant) != text
    with pytest.raises(ValueError, match="once; got it 2 times"):
        mutated(text + mutant.old, mutant)
    with pytest.raises(ValueError, match="once; got it 0 times"):
        mutated(text.replace(mutant.old, ""), mutant)
