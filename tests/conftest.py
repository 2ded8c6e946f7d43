"""Shared fixtures: the installed published tables, a small tree of made-up ones, and a browser for reports.

Without a GPU, kernels run on Triton's interpreter: the switch must be set before any kernel is
imported, and the repairs of ``bench/interpreter.py`` make its results true.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import CHROMIUM

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def compilations(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one test has compiled no other compiles again; nothing is left from, or for, another run.

    Workers of pytest-xdist share it: their temporary folders lie in one.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "compilations"
    folder.mkdir(exist_ok=True)
    os.environ["TOKENFAB_CACHE"] = str(folder)


@pytest.fixture(scope="session")
def published() -> Any:
    """The published tables of the installed package."""
    from tokenfab.bench.published import PublishedData

    return PublishedData()


WriteTable = Callable[[str, dict[str, list[Any]]], Path]


@pytest.fixture
def tree(tmp_path: Path) -> tuple[Path, WriteTable]:
    """An empty tree of published tables and a function that writes one table into it.

    The function takes ``system/family/stack/version/table`` and the columns; scalars are repeated.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "query_versions.yaml").write_text('defaults: {vllm: {current: "2.0"}, sglang: {current: "2.0"}}\n')
    (tmp_path / "data" / "h100_sxm").mkdir(parents=True)

    def write(place: str, columns: dict[str, Any]) -> Path:
        path = tmp_path / "data" / f"{place}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        length = max(len(value) for value in columns.values() if isinstance(value, list))
        filled = {name: value if isinstance(value, list) else [value] * length for name, value in columns.items()}
        pq.write_table(pa.table({"kernel_source": ["kernel"] * length, **filled}), path)
        return path

    return tmp_path, write


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield launched
        launched.close()
