"""What gets installed: the three rooms and their data, and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.splitlines():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("tokenfab-*.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_wheel_holds_every_module_and_data_file(wheel: set[str]) -> None:
    expected = {
        f"tokenfab/{path.relative_to(ROOT)}"
        for room in ("commands", "kernels", "bench", "costing")
        for path in (ROOT / room).rglob("*.py")
        if "templates" not in path.parts
    }
    expected |= {f"tokenfab/{path.relative_to(ROOT)}" for path in (ROOT / "bench" / "models").glob("*.json")}
    for data in ("templates/*.py", "recorded/*.json*", "tuned/*.json"):
        expected |= {f"tokenfab/{path.relative_to(ROOT)}" for path in (ROOT / "bench").glob(data)}
    expected |= {
        "tokenfab/__init__.py",
        "tokenfab/__main__.py",
        "tokenfab/costing/prices.toml",
        "tokenfab/costing/levers/errors.json",
        "tokenfab/costing/report/page.html",
        "tokenfab/costing/report/page.js",
    }
    inside = {name for name in wheel if ".dist-info/" not in name}
    assert inside == expected


def test_rooms_import_each_other_relatively_and_no_top_level_kernels() -> None:
    """Another popular package owns the name ``kernels``."""
    for room in ("commands", "kernels", "bench", "costing"):
        for path in (ROOT / room).rglob("*.py"):
            if "templates" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    assert node.module is not None
                    assert node.module.split(".")[0] not in {"tokenfab", "commands", "kernels", "bench", "costing"}, (
                        path
                    )


def test_files_stay_readable() -> None:
    """Past 400 lines a file is two things."""
    rooms = ("commands", "kernels", "bench", "costing")
    sources = [*ROOT.glob("*.py"), *(path for room in rooms for path in (ROOT / room).rglob("*.py"))]
    assert [p.name for p in sources if len(p.read_text().splitlines()) > 400] == []
