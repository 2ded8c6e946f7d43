"""Rows 23 and 26 for everything that tokenfab reads: a damaged file is one typed error that names it, and nothing in a
file is executed or followed.

Records have more tests of their own in ``tests/bench/test_records.py`` and ``test_record.py``.
"""

from __future__ import annotations

import math
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.inspect_gate import Baseline, read_baseline, write_baseline
from tokenfab.bench.lab_checks import CheckFile, KernelCheck
from tokenfab.bench.models import SHIPPED, load_model
from tokenfab.bench.ops import Gemm
from tokenfab.bench.published import MEASURED, MODELLED, PublishedData, Stack
from tokenfab.bench.record import encode
from tokenfab.bench.records import RecordStore
from tokenfab.bench.tune_table import read_table, update_table
from tokenfab.costing.prices import SHIPPED_PRICES, PriceBook
from tokenfab.tests.bench.made_records import RECORD
from tokenfab.tests.conftest import WriteTable
from tokenfab.tests.reliability.dying import in_child
from tokenfab.tests.reliability.test_writers import tuned_row

H100 = get_gpu("h100")
GEMM = {"m": [1, 2], "n": 32, "k": 32, "gemm_dtype": "bfloat16", "latency": [0.1, 0.2]}


@dataclass(frozen=True)
class Reader:
    """One kind of input: its file in a folder, how a good one is made, how it is read.

    ``names``: what an error names it by, where that is not its file.
    """

    file: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    names: str = ""


def _published(path: Path) -> Any:
    data = PublishedData(path.parent)
    return data.stack(H100, "vllm")


def _tree(path: Path) -> None:
    (path.parent / "data" / "h100_sxm").mkdir(parents=True)
    path.write_text('defaults: {vllm: {current: "2.0"}}\n')


READERS = {
    "model": Reader(
        "config.json", lambda path: (void(shutil.copy(SHIPPED / "gpt-oss-120b.json", path))),
        lambda path: load_model(str(path)), "model",
    ),
    "prices": Reader("prices.toml", lambda path: void(shutil.copy(SHIPPED_PRICES, path)), PriceBook.read),
    "records": Reader(
        "h100.jsonl", lambda path: void(path.write_bytes(encode(RECORD))),
        lambda path: list(RecordStore(path.parent, path.name).records()),
    ),
    "tuned table": Reader(
        "h100.json", lambda path: void(update_table(path, H100, [tuned_row(1)])), lambda path: read_table(path, H100)
    ),
    "inspection baseline": Reader(
        "inspection.json",
        lambda path: write_baseline(path, Baseline(schema_version=1, toolchain={"triton": "3.6.0"}, points={})),
        read_baseline,
    ),
    "checks": Reader(
        "checks.jsonl",
        lambda path: CheckFile(path).append(KernelCheck(how="lab", kernel="a", shape={"m": 1}, version="1")),
        lambda path: CheckFile(path).read(),
    ),
    "published versions": Reader("query_versions.yaml", _tree, _published),
}  # fmt: skip


def void(value: object) -> None:
    """An action's result, which nobody asks for."""


class Executed:
    """Unpickled, makes a folder."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._trace),)


def hostile(kind: str, trace: Path) -> bytes:
    """What would make the folder ``trace`` if it were executed."""
    return {
        "pickle": pickle.dumps(Executed(trace)) + b"\n",
        "yaml tag": f"!!python/object/apply:os.mkdir ['{trace}']\n".encode(),
        "yaml tag in a field": f"defaults: {{vllm: !!python/object/apply:os.mkdir ['{trace}']}}\n".encode(),
    }[kind]


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> Reader:
    return READERS[request.param]


@pytest.mark.parametrize("kind", ["pickle", "yaml tag", "yaml tag in a field"])
def test_r26_pickle_and_yaml_tags_are_not_executed(reader: Reader, kind: str, tmp_path: Path) -> None:
    path, trace = tmp_path / reader.file, tmp_path / "trace"
    reader.make(path)
    assert reader.read(path)
    path.write_bytes(hostile(kind, trace))
    with pytest.raises(ValueError, match="expected|Expected|malformed|Invalid|invalid|decode"):
        reader.read(path)
    assert not trace.exists()


def test_the_hostile_inputs_are(tmp_path: Path) -> None:
    """Executed, they leave their trace: else the test above would show nothing."""
    import yaml

    pickle.loads(hostile("pickle", tmp_path / "pickle"))  # noqa: S301
    yaml.unsafe_load(hostile("yaml tag", tmp_path / "yaml"))
    assert (tmp_path / "pickle").is_dir()
    assert (tmp_path / "yaml").is_dir()


def test_r26_only_safetensors_of_a_checkpoint_are_opened(tmp_path: Path) -> None:
    """Pickled weights beside them, and an index that names files elsewhere, are not looked at."""
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    from tokenfab.bench.step_checkpoint import CheckpointTensors

    folder, trace = tmp_path / "model", tmp_path / "trace"
    folder.mkdir()
    for name in ("pytorch_model.bin", "model.pt", "weights.pkl"):
        (folder / name).write_bytes(hostile("pickle", trace))
    safetensors.save_file({"elsewhere": torch.ones(1)}, str(tmp_path / "secret.safetensors"))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"elsewhere": "../secret.safetensors"}}')
    with pytest.raises(ValueError, match=r"folder: expected \*\.safetensors in .*; got none"):
        CheckpointTensors(folder, torch.device("cpu"))
    safetensors.save_file({"here": torch.ones(1)}, str(folder / "model.safetensors"))
    assert list(CheckpointTensors(folder, torch.device("cpu"))) == ["here"]
    (folder / "model.safetensors").write_bytes(hostile("pickle", trace))
    with pytest.raises(ValueError, match="model.safetensors: expected a safetensors file"):
        CheckpointTensors(folder, torch.device("cpu"))
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["tuned table", "inspection baseline", "records"])
def test_r26_symlinks_are_not_followed(kind: str, tmp_path: Path) -> None:
    """What tokenfab writes and finds by itself is no link to another file, neither read nor written through one."""
    reader = READERS[kind]
    target, path = tmp_path / "elsewhere" / reader.file, tmp_path / reader.file
    target.parent.mkdir()
    reader.make(target)
    before = target.read_bytes()
    path.symlink_to(target)
    with pytest.raises(ValueError, match=f"{path.name}"):
        reader.read(path)
    if kind == "tuned table":
        with pytest.raises(ValueError, match=path.name):
            update_table(path, H100, [tuned_row(2)])
    if kind == "inspection baseline":
        reader.make(path)  # in place of the link
        assert not path.is_symlink()
    assert target.read_bytes() == before


@pytest.mark.parametrize("spec", ["vllm@../../../elsewhere/vllm/1.0", "vllm@/", "../vllm", "vllm@.."])
def test_r26_a_stack_is_no_path(tree: tuple[Path, WriteTable], spec: str) -> None:
    root, write = tree
    write("h100_sxm/gemm/vllm/2.0/gemm_perf", GEMM)
    with pytest.raises(ValueError, match=r"^stack: expected "):
        PublishedData(root).stack(H100, spec)


OUTSIDE = "../../../../../elsewhere"
REUSE = "reuse: [{table: gemm_perf, from_version: '%s'}]\n"


@pytest.mark.parametrize("where", ["reuse.yaml", "query_versions.yaml"])
def test_r26_versions_in_a_tree_do_not_lead_out_of_it(tree: tuple[Path, WriteTable], where: str) -> None:
    """A table beside the tree is not read: an error, or a model's time."""
    root, write = tree
    table = write("h100_sxm/gemm/vllm/9.0/gemm_perf", GEMM)
    assert PublishedData(root).time(Gemm(1, 32, 32), H100, Stack("vllm", "9.0")).provenance == MEASURED
    inside, outside = root / "inside", root / "elsewhere"
    version = inside / "data" / "h100_sxm" / "gemm" / "vllm" / "2.0"
    version.mkdir(parents=True)
    outside.mkdir()
    table.rename(outside / table.name)
    assert (version.parent / OUTSIDE / table.name).is_file()
    current = OUTSIDE if where == "query_versions.yaml" else "2.0"
    (inside / "query_versions.yaml").write_text(f'defaults: {{vllm: {{current: "{current}"}}}}\n')
    if where == "reuse.yaml":
        (version / where).write_text(REUSE % OUTSIDE)
    data = PublishedData(inside)
    try:
        provenance = data.time(Gemm(1, 32, 32), H100, data.stack(H100, "vllm")).provenance
    except ValueError:
        provenance = MODELLED
    assert provenance == MODELLED


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda good: good[: len(good) // 2],
    "not utf-8": lambda good: good[:1] + b"\xff\xfe" + good[1:],
    "nested": lambda good: (b'{"a": ' if good.startswith((b"{", b"defaults")) else b"a = ") + b"[" * 100_000 + b"\n",
    "another type": lambda good: b"null\n",
    "zeros": lambda good: bytes(len(good)) + b"\n",
}
TORN = {("records", "truncated"), ("checks", "truncated")}
"""A last line without its end is what a killed writer leaves: the lines before it count."""


def _damaged() -> list[tuple[str, str]]:
    return [(kind, damage) for kind in READERS for damage in DAMAGE if (kind, damage) not in TORN]


@pytest.mark.parametrize(("kind", "damage"), _damaged())
def test_r23_damaged_file(kind: str, damage: str, tmp_path: Path) -> None:
    """One ``ValueError`` that names the file; in a process of its own, which must live to raise it."""
    reader, path = READERS[kind], tmp_path / READERS[kind].file
    reader.make(path)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))

    def read() -> None:
        try:
            found = reader.read(path)
        except ValueError as error:
            os._exit(10 if (reader.names or path.name) in str(error) else 11)
        os._exit(12 if found is not None else 13)

    assert in_child(read) == 10


def test_r23_nan_is_no_number(tmp_path: Path) -> None:
    for kind, place in (("records", b'"l2_bytes":'), ("tuned table", b'"gain": '), ("prices", b"usd_per_gpu_hour = ")):
        reader = READERS[kind]
        path = tmp_path / reader.file
        reader.make(path)
        good = path.read_bytes()
        assert place in good
        head, _, rest = good.partition(place)
        for word in (b"nan" if kind == "prices" else b"NaN", b"inf" if kind == "prices" else b"Infinity", b"1e999"):
            number = rest[: len(rest) - len(rest.lstrip(b"0123456789.e-+"))]
            path.write_bytes(head + place + word + rest[len(number) :])
            with pytest.raises(ValueError, match=path.name):
                reader.read(path)
    assert math.isfinite(PriceBook.read().look_up("h100").usd_per_gpu_hour)
