"""Published kernel measurements: what vLLM, SGLang and TensorRT-LLM reach on a GPU, op by op.

``PublishedData.time(op, gpu, stack)`` answers with a time and where it is from: ``measured`` (the
exact row), ``interpolated`` (between rows), or ``modelled`` (beyond the last row, borrowed from the
nearest shape, or the roofline at a stated efficiency). Never a silent guess.

Source: ``aiconfigurator-core`` (NVIDIA, Apache-2.0), Parquet under ``systems/data/<system>/<family>/
<stack>/<version>/``. The installed wheel is the default; any folder with the same tree will do. A
table missing from the asked version is served by its ``reuse.yaml`` or by the newest older version
that has the row, and the answer names the version used.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from packaging.version import InvalidVersion, Version

from .domain import anchor
from .gpus import Gpu
from .interpolation import look_up
from .ops import Collective, ExpertAllToAll, Module, Op
from .published_rows import PublishedDataError, Rows
from .published_tables import Query, Table, one_token, queries

STACKS = ("vllm", "sglang", "trtllm")
MEASURED_HERE, MEASURED, INTERPOLATED_HERE, INTERPOLATED, MODELLED = PROVENANCES = (
    "measured here", "measured", "interpolated here", "interpolated", "modelled",
)  # fmt: skip
"""Best first. "Here": from tokenfab's own records; see ``recorded``. The tables of this module give the other three."""

PUBLISHED_PROVENANCES = (MEASURED, INTERPOLATED, MODELLED)

MODEL_EFFICIENCY = 0.8
MODEL_OVERHEAD_S = 3e-6
MODEL_LINK_OVERHEAD_S = 10e-6
"""The model where no table answers: floor / efficiency + overhead (per kernel, or per collective).
Source: ``aiconfigurator-core`` ``systems/*.yaml`` (``mem_bw_empirical_scaling_factor``,
``mem_empirical_constant_latency``, ``p2p_latency``), its own unofficial corrections."""

SEVERAL_TOKENS = "the row ran one query token per sequence; x the floors' ratio"
"""What is said of attention over several query tokens."""

INSTALL_HINT = "pip install 'aiconfigurator-core>=0.12,<0.13', or --published-data DIR for a checkout's tree"


@dataclass(frozen=True)
class Timing:
    """A time and where it is from. ``source``: stack, version, table, kernel, and what was done."""

    time_s: float
    provenance: str
    source: str


@dataclass(frozen=True)
class Stack:
    """A serving stack at a version: ``vllm`` (the current one) or ``vllm@0.19.0``."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def provenances(self) -> tuple[str, ...]:
        """What a time of this stack can be."""
        return PUBLISHED_PROVENANCES


def model_overhead_s(op: Op) -> float:
    """What the model adds to the roofline: per kernel, or per collective."""
    kernels = len(op.parts) if isinstance(op, Module) else 1
    return kernels * (MODEL_LINK_OVERHEAD_S if isinstance(op, Collective | ExpertAllToAll) else MODEL_OVERHEAD_S)


def model_timing(op: Op, gpu: Gpu, why: str) -> Timing:
    """The roofline at the stated efficiency, for an op no table answers."""
    overhead_s = model_overhead_s(op)
    made = f"roofline / {MODEL_EFFICIENCY:g} + {overhead_s * 1e6:g} us"
    return Timing(op.floor_s(gpu) / MODEL_EFFICIENCY + overhead_s, MODELLED, f"{made} ({why})")


class PublishedData:
    """The published tables of one tree."""

    def __init__(self, root: Path | None = None) -> None:
        """``root``: a folder with ``query_versions.yaml`` and ``data/``, or one that holds such; None for the wheel.

        Raises:
            PublishedDataError: no such tree, or the package is not installed.
        """
        self.root = _wheel_systems() if root is None else _find_systems(root)
        self._rows: dict[tuple[Path, Table], Rows] = {}
        self._candidates: dict[tuple[str, Stack, str], list[tuple[str, Path]]] = {}
        self._answers: dict[tuple[Op, str, int, Stack], Timing] = {}

    # -- versions ------------------------------------------------------------------------------

    @cached_property
    def _query_versions(self) -> dict[str, Any]:
        return _read_yaml(self.root / "query_versions.yaml")

    def stack(self, gpu: Gpu, spec: str) -> Stack:
        """``"vllm"`` or ``"vllm@0.19.0"`` on this GPU.

        Raises:
            ValueError: unknown stack; a GPU without published tables; a version without any.
        """
        name, _, version = spec.partition("@")
        if name not in STACKS:
            raise ValueError(f"stack: expected one of {', '.join(STACKS)}, or STACK@VERSION; got {spec!r}")
        system = gpu.published_system
        if system is None or not (self.root / "data" / system).is_dir():
            raise PublishedDataError(f"gpu: no published measurements for {gpu.name}")
        if not version:
            slots = {
                **self._query_versions.get("defaults", {}),
                **self._query_versions.get("overrides", {}).get(system, {}),
            }
            if name not in slots:
                raise PublishedDataError(
                    f"stack: {self.root / 'query_versions.yaml'} names no {name} version for {system}"
                )
            return Stack(name, str(slots[name]["current"]))
        known = self.versions(gpu, name)
        if version not in known:
            raise ValueError(f"stack: expected {name} at one of {', '.join(known)} on {gpu.name}; got {version!r}")
        return Stack(name, version)

    def versions(self, gpu: Gpu, name: str) -> list[str]:
        """Versions of a stack with any table for this GPU, newest first."""
        folders = (self.root / "data" / str(gpu.published_system)).glob(f"*/{name}/*/")
        return _newest_first({folder.name for folder in folders})

    def files(self, gpu: Gpu, stack: Stack, table: Table) -> list[tuple[str, Path]]:
        """(version, file) that may answer, best first: the asked version, what it reuses, then older ones."""
        key = (gpu.name, stack, table.file)
        if key not in self._candidates:
            self._candidates[key] = list(self._find_files(gpu, stack, table))
        return self._candidates[key]

    def _find_files(self, gpu: Gpu, stack: Stack, table: Table) -> Iterator[tuple[str, Path]]:
        is_nccl = table.file == "nccl_perf"
        base = self.root / "data" / str(gpu.published_system) / table.family / ("nccl" if is_nccl else stack.name)
        versions = _newest_first({folder.parent.name for folder in base.glob(f"*/{table.file}.parquet")})
        if not is_nccl:
            reuse = base / stack.version / "reuse.yaml"
            donors = _read_yaml(reuse).get("reuse", []) if reuse.is_file() else []
            first = [str(row["from_version"]) for row in donors if row["table"] == table.file]
            older = [version for version in versions if _version(version) <= _version(stack.version)]
            versions = list(dict.fromkeys([*(v for v in older if v == stack.version), *first, *older]))
        for version in versions:
            if not re.fullmatch(r"[\w.+-]*\w", version):
                raise PublishedDataError(f"{self.root}: expected a version; got {version!r}")
            path = base / version / f"{table.file}.parquet"
            if path.is_file():
                yield version, path

    def rows(self, path: Path, table: Table) -> Rows:
        key = (path, table)
        if key not in self._rows:
            self._rows[key] = Rows(path, table)
        return self._rows[key]

    # -- answers ---------------------------------------------------------------------------------

    def has_table(self, gpu: Gpu, stack: Stack, table: Table) -> bool:
        """Whether any version up to the stack's has this table for the GPU."""
        return bool(self.files(gpu, stack, table))

    def has_rows(self, op: Op, gpu: Gpu, stack: Stack) -> bool:
        """Whether a table has rows of this op's very shape, wherever they end."""
        return any(
            self.rows(path, query.table).grid((*query.exact, *query.near)) is not None
            for query in queries(op, gpu, stack.name)
            for _, path in self.files(gpu, stack, query.table)
        )

    def time(self, op: Op, gpu: Gpu, stack: Stack) -> Timing:
        """The time of one call of ``op`` in ``stack`` on ``gpu``, with its provenance."""
        key = (op, gpu.name, gpu.scale_up_gpus, stack)
        if key not in self._answers:
            self._answers[key] = self._time(op, gpu, stack)
        return self._answers[key]

    def _time(self, op: Op, gpu: Gpu, stack: Stack) -> Timing:
        near = anchor(op, gpu)
        if near is not None:  # a scale-up domain that no row was measured in
            found = self.time(*near, stack)
            rise_s = max(0.0, op.floor_s(gpu) - near[0].floor_s(near[1]))
            made = f"and the rise of the floor in a domain of {gpu.scale_up_gpus} / {MODEL_EFFICIENCY:g}"
            return Timing(found.time_s + rise_s / MODEL_EFFICIENCY, MODELLED, f"{found.source}, {made}")
        single = one_token(op)
        found = self._answer(single, gpu, stack)
        if found is None:
            return model_timing(op, gpu, f"no published {op.kind} row")
        if single is op:
            return found
        return Timing(
            found.time_s * op.floor_s(gpu) / single.floor_s(gpu), MODELLED, f"{found.source} ({SEVERAL_TOKENS})"
        )

    def _answer(self, op: Op, gpu: Gpu, stack: Stack) -> Timing | None:
        asked = queries(op, gpu, stack.name)
        best: Timing | None = None
        for query in asked:
            answer = self._from_tables(query, gpu, stack)
            if answer is not None and answer.provenance != MODELLED:
                return answer
            best = best or answer
        for query in asked if best is None else ():
            best = best or self._borrowed(query, op, gpu, stack)
        return best

    def _from_tables(self, query: Query, gpu: Gpu, stack: Stack) -> Timing | None:
        """The answer of the first version that has rows of this very shape."""
        for version, path in self.files(gpu, stack, query.table):
            rows = self.rows(path, query.table)
            grid = rows.grid((*query.exact, *query.near))
            if grid is None:
                continue
            found = look_up(grid, query.axes, lambda axes: query.at(query.near, axes).floor_s(gpu), query.table.axes)
            provenance = {"exact": MEASURED, "between": INTERPOLATED, "beyond": MODELLED}[found.how]
            source = (
                f"{_stack_name(query.table, stack)} {version} {query.table.name}: {rows.kernel_names[found.kernel]}"
            )
            notes = "; ".join(note for note in (found.note, query.caveat) if note)
            provenance = MODELLED if query.caveat else provenance
            timing = Timing(found.time_s, provenance, f"{source} ({notes})" if notes else source)
            if query.plus is None:
                return timing
            more = self._from_tables(query.plus, gpu, stack)
            if more is None:
                return None
            weaker = max(timing.provenance, more.provenance, key=PROVENANCES.index)
            return Timing(timing.time_s + more.time_s, weaker, f"{timing.source} + {query.plus.exact[0]}")
        return None

    def _borrowed(self, query: Query, op: Op, gpu: Gpu, stack: Stack) -> Timing | None:
        """A model from the nearest published shape; None where there is none.

        A kernel is given that shape's efficiency. A communication op, whose time is mostly latency,
        is given that shape's time and the floors' difference at ``MODEL_EFFICIENCY``.
        """
        if not query.near or query.plus is not None or isinstance(op, Module):
            return None
        for version, path in self.files(gpu, stack, query.table):
            rows = self.rows(path, query.table)
            near = rows.nearest(query)
            if near is None:
                continue
            grid = rows.grid((*query.exact, *near))
            assert grid is not None
            found = look_up(
                grid, query.axes, lambda axes, near=near: query.at(near, axes).floor_s(gpu), query.table.axes
            )
            floor_s, near_floor_s = op.floor_s(gpu), query.at(near, query.axes).floor_s(gpu)
            shape = ", ".join(f"{name}={value}" for name, value in zip(query.table.near, near, strict=True))
            row = f"{_stack_name(query.table, stack)} {version} {query.table.name} at {shape}"
            if isinstance(op, Collective | ExpertAllToAll):
                time_s = found.time_s + max(0.0, floor_s - near_floor_s) / MODEL_EFFICIENCY
                return Timing(time_s, MODELLED, f"{row}, and the rise of the floor / {MODEL_EFFICIENCY:g}")
            return Timing(found.time_s * floor_s / near_floor_s, MODELLED, f"roofline at the efficiency of {row}")
        return None


def _stack_name(table: Table, stack: Stack) -> str:
    return "nccl" if table.file == "nccl_perf" else stack.name


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        raise PublishedDataError(f"version: expected one like 0.24.0; got {text!r}") from None


def _newest_first(versions: set[str]) -> list[str]:
    return sorted(versions, key=_version, reverse=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(), Loader=yaml.SafeLoader)  # libyaml's has no limit of depth
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise PublishedDataError(f"{path}: expected readable YAML; {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise PublishedDataError(f"{path}: expected a YAML mapping; got {type(data).__name__}")
    return data


def _wheel_systems() -> Path:
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or spec.origin is None:
        raise PublishedDataError(f"published data: aiconfigurator-core is not installed; {INSTALL_HINT}")
    return _find_systems(Path(spec.origin).parent)


def _find_systems(root: Path) -> Path:
    for inner in (".", "systems", "aiconfigurator_core/systems", "aic-core/src/aiconfigurator_core/systems"):
        if (root / inner / "query_versions.yaml").is_file() and (root / inner / "data").is_dir():
            return (root / inner).resolve()
    raise PublishedDataError(f"published data: expected a folder with query_versions.yaml and data/; got {root}")
