"""Compilation over a Ray cluster of two nodes of this machine, with compilers that are not there.

Everything else is what a sweep runs: the driver in a process of its own, Ray's tasks, the cache.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tokenfab.__main__ import cli
from tokenfab.bench import fleet_compile, fleet_ray, inspect_child
from tokenfab.bench.fleet import FleetError, Job, Lost
from tokenfab.bench.fleet_compile import compile_on
from tokenfab.bench.fleet_ray import _Label, _label, connect
from tokenfab.bench.inspect import inspect
from tokenfab.tests.bench import fleet_driver, fleet_fakes
from tokenfab.tests.bench.fleet_cluster import cluster as start_cluster
from tokenfab.tests.bench.fleet_cluster import within

COUNT = 240
WAIT_S = 90.0


def wait_until(holds: Any, what: str) -> None:
    end_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end_s, f"waited {WAIT_S:g} s until {what}"
        time.sleep(0.02)


def drive(address: str, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", fleet_driver.__name__, address, str(cache), str(COUNT)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.fixture
def on_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What ``inspect`` finds without a cluster, with the same compiler."""

    class Child:
        module, alive = "", True

        def __init__(self, module: str) -> None:
            self.module = module

        def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
            return fleet_fakes.answer(job)

        def close(self) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(inspect_child, "Child", Child)
        return fleet_driver.as_rows(inspect(fleet_fakes.points(COUNT), ["sm_90"], cache_dir=tmp_path / "one"))


def test_r30_a_node_and_then_the_driver_are_killed_and_nothing_is_lost(
    tmp_path: Path, on_one_process: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """240 points on two nodes. Each node has one CPU, so one point of the killed node is in flight and is begun again;
    of the killed driver, the one of the node that is left, and one whose answer was under way."""
    cache, log = tmp_path / "cache", tmp_path / "compiled"

    def num_cached() -> int:
        return len(list(cache.glob("*.json")))

    with within(400), start_cluster(tmp_path, {"num_cpus": 1}, {"num_cpus": 1}) as made:
        first = drive(made.address, cache)
        try:
            wait_until(
                lambda: (
                    (num_cached() >= 40 and len({pid for _, pid in fleet_fakes.noted(log)}) == 2)
                    or first.poll() is not None
                ),
                "40 points were kept and both nodes compiled",
            )
            assert first.poll() is None, first.communicate()[1]
            made.remove_node(next(iter(made.worker_nodes)), allow_graceful=False)
            after_node = num_cached()
            wait_until(lambda: num_cached() >= after_node + 40 or first.poll() is not None, "the other node went on")
            assert first.poll() is None, first.communicate()[1]
        finally:
            os.killpg(first.pid, signal.SIGKILL)
        first.communicate(timeout=30)
        kept = num_cached()
        assert after_node + 40 <= kept < COUNT
        repeats = [number for number, times in Counter(n for n, _ in fleet_fakes.noted(log)).items() if times > 1]
        assert len(repeats) <= 1, "more than the point in flight on the killed node"
        wait_until(lambda: _is_quiet(log), "the dead driver's worker ended")
        before = {number for number, _ in fleet_fakes.noted(log)}
        second = drive(made.address, cache)
        try:
            stdout, stderr = second.communicate(timeout=WAIT_S)
        finally:
            if second.poll() is None:
                os.killpg(second.pid, signal.SIGKILL)
        assert second.returncode == 0, stderr
        result = json.loads(stdout)
        assert result["rows"] == on_one_process
        assert result["cached"] == kept
        compiled = Counter(number for number, _ in fleet_fakes.noted(log))
        assert set(compiled) == set(range(COUNT))
        assert len([number for number in before if compiled[number] > 1]) <= 1 + 2
        assert sum(compiled.values()) <= COUNT + 1 + 2

        # the same cluster: a compiler that takes its worker down is a finding, and stops no other
        monkeypatch.setattr(fleet_compile, "WORKER", f"{fleet_fakes.__name__}:compile_point")
        (tmp_path / "kills-3").touch()
        log.unlink()
        with connect(made.address) as cluster:
            found = inspect(
                fleet_fakes.points(6), ["sm_90"], cache_dir=tmp_path / "other", compile_all=compile_on(cluster.spread)
            )
            assert [each.compiled is None for each in found] == [number == 3 for number in range(6)]
            (finding,) = found[3].findings
            assert finding.kind == "abort"
            assert finding.text.startswith("died: 2 workers ended at it")
            assert Counter(number for number, _ in fleet_fakes.noted(log))[3] == 2
            _other_errors(cluster)


def _is_quiet(log: Path) -> bool:
    size = log.stat().st_size
    time.sleep(1.0)
    return log.stat().st_size == size


def _other_errors(cluster: Any) -> None:
    """What a worker's function raises is raised on the driver; what a cluster has not is said."""
    jobs = [Job("1", "one", {"fingerprint": "another", "toolchain": {}, "python": "", "environment": {}})]
    with pytest.raises(FleetError, match="expected tokenfab's sources on .* as where the sweep was started"):
        list(cluster.spread("tokenfab.bench.fleet_compile:compile_point", jobs))
    with pytest.raises(FleetError, match="No module named 'no_such_module'"):
        list(cluster.spread("no_such_module:function", jobs))
    with pytest.raises(FleetError, match=r"expected a node with h100 .*the cluster has no GPU.*gpu_model:h100"):
        cluster.seats("h100", "tokenfab.bench.fleet_seat:Seat")
    assert (cluster.num_cpus(), cluster.num_nodes()) == (1, 1)


# -- without a cluster -----------------------------------------------------------------------------


def test_nodes_name_their_gpus() -> None:
    ray_s = _label({"CPU": 8.0, "GPU": 8.0, "accelerator_type:H100": 1.0})
    assert ray_s is not None
    assert ray_s == _Label("h100", accelerator_type="H100")
    assert ray_s.options == {"accelerator_type": "H100"}
    own = _label({"GPU": 8.0, "accelerator_type:H100": 1.0, "gpu_model:h100_pcie": 8.0})
    assert own is not None
    assert own == _Label("h100_pcie", resource="gpu_model:h100_pcie")
    assert own.options == {"resources": {"gpu_model:h100_pcie": 1}}
    assert _label({"GPU": 1.0, "accelerator_type:Future": 1.0}) is None


class Nodes:
    """As much of ray as tells what nodes there are."""

    def __init__(self, *resources: dict[str, float], dead: int = 0) -> None:
        self._all = [{"Alive": number >= dead, "Resources": each} for number, each in enumerate(resources)]

    def nodes(self) -> list[dict[str, Any]]:
        return self._all


def test_gpus_of_a_mixed_cluster() -> None:
    cluster = fleet_ray.Cluster(
        Nodes(
            {"CPU": 2.0, "GPU": 8.0, "accelerator_type:H100": 1.0},
            {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0},
            {"CPU": 64.0, "GPU": 4.0, "accelerator_type:H200": 1.0},
            {"CPU": 4.0, "GPU": 2.0, "gpu_model:h100": 2.0, "accelerator_type:G": 1.0},
            {"CPU": 4.0, "GPU": 1.0},
            {"CPU": 4.0},
            dead=1,
        )
    )
    assert cluster.gpu_models() == {"h100": 10, "h200": 4, "unknown": 1}
    assert cluster.num_cpus() == 64 + 64 + 4 + 4 + 4
    labels = {label.accelerator_type: count for label, count in cluster._kinds("h100").items()}
    assert labels == {"H100": 8, "": 2}
    assert cluster._kinds("b200") == {}
    few = fleet_ray.Cluster(Nodes({"CPU": 3.0, "GPU": 8.0, "accelerator_type:H100": 1.0}))
    assert list(few._kinds("h100").values()) == [3]  # a CPU for each


def test_r30_a_lost_answer_is_a_failure() -> None:
    def spread(function: str, jobs: Any) -> Any:
        yield jobs[0], Lost("died: twice")

    job = {"function": "f", "arch": "sm_90"}
    assert list(compile_on(spread)([(7, job)])) == [(7, {"failure": "abort", "text": "died: twice"})]
    assert list(compile_on(spread)([])) == []


@pytest.mark.parametrize(
    "command",
    ["inspect quantize", "bench gemm --gpu h100", "tune gemm --gpu h100", "lab --gpu h100", "cost deepseek-v3"],
)
def test_without_the_extra_one_line_names_it(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(cli, [*command.split(), "--ray", "auto"])
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line == "error: ray: expected it installed; pip install 'tokenfab[ray]', in a checkout pip install '.[ray]'"


def test_jobs_are_rays_matter() -> None:
    result = CliRunner().invoke(cli, ["inspect", "quantize", "--ray", "auto", "--jobs", "3"])
    assert (result.exit_code, result.output[:13]) == (2, "error: jobs: ")


def test_one_module_imports_ray() -> None:
    root = Path(fleet_ray.__file__).parents[1]
    found = {
        str(path.relative_to(root))
        for room in ("bench", "commands", "costing", "kernels")
        for path in (root / room).rglob("*.py")
        if re.search(r"^\s*(import|from) ray\b", path.read_text(), re.M)
    }
    assert found == {"bench/fleet_ray.py"}


def test_r30_no_cluster_at_an_address() -> None:
    pytest.importorskip("ray", reason="needs the extra: pip install '.[ray]'")
    with pytest.raises(FleetError, match=r"ray: expected a cluster at '127\.0\.0\.1'"), connect("127.0.0.1"):
        pass
