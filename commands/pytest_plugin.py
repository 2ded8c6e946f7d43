"""The pytest plugin: kernels timed on the GPU by tokenfab's core, kept by pytest-benchmark.

    def test_o_proj(kernel_benchmark):
        measured = kernel_benchmark("gemm/fp8_block-fp8_group", m=64, n=7168, k=16384)
        assert measured.roofline_fraction > 0.5

    pytest --tokenfab --benchmark-autosave          # three times: the spread between processes is the noise
    tokenfab gate times .benchmarks/baseline .benchmarks/h100

pytest-benchmark sees the device's own seconds: its timer is a clock that each sample advances. ``extra_info`` holds
tokens/s, bandwidth, share of the roofline, $/M, and under "tokenfab" what ``tokenfab gate times`` needs. A result that
is wrong, or a time that is not to be believed, fails the test with the reason.

With ``--tokenfab`` pytest-benchmark's default storage becomes one folder per GPU, .benchmarks/GPU: its own is named by
operating system and Python alone, so that two GPUs would overwrite each other's baselines. Without the option these
tests are skipped: a machine's GPU is not taken unasked. Under pytest-xdist pytest-benchmark measures nothing: give each
GPU a process of its own.

Source: pytest-benchmark 5.3 (markers, ``pedantic``, ``extra_info``).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ..bench.measurement import Measurement, Settings
    from ..bench.record import Record
    from ..kernels.registry import Kernel

_STORAGE = "file://./.benchmarks"
_OFF = "give --tokenfab to time kernels on this machine's GPU"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tokenfab")
    group.addoption("--tokenfab", action="store_true", help="Time kernels on this machine's GPU (kernel_benchmark).")
    group.addoption("--tokenfab-gpu", metavar="NAME", help="Which row of `tokenfab gpus` it is; told by its name.")
    group.addoption("--tokenfab-model", metavar="A,B", default="deepseek-v3,qwen3-30b-a3b,gpt-oss-120b",
                    help="Models whose steps say what a kernel is worth. Default: %(default)s")  # fmt: skip
    group.addoption("--tokenfab-tier", metavar="TIER", default="rent_3yr", help="Price tier. Default: %(default)s")
    group.addoption("--tokenfab-usd-per-gpu-hour", metavar="USD", type=float, help="This price instead of the book's.")
    group.addoption("--tokenfab-budget", metavar="S", type=float, default=3.0,
                    help="Seconds of timing per kernel. Default: %(default)s")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Before pytest-benchmark opens its storage: one folder per GPU."""
    if config.getoption("tokenfab") and config.getoption("benchmark_storage", None) == _STORAGE:
        from ..bench.campaign import gpu_of
        from ..bench.cuda_device import CudaDevice
        from ..bench.device import NoGpu

        try:
            name = gpu_of(CudaDevice().properties, config.getoption("tokenfab_gpu")).name
        except NoGpu as error:
            raise pytest.UsageError(f"--tokenfab: {error}") from None
        config.option.benchmark_storage = f"{_STORAGE}/{name}"


@pytest.fixture(scope="session")
def tokenfab_device(request: pytest.FixtureRequest) -> Any:
    """The GPU; override it to measure on another ``bench.device.Device``."""
    if not request.config.getoption("tokenfab"):
        pytest.skip(_OFF)
    from ..bench.cuda_device import CudaDevice

    return CudaDevice()


class VirtualClock:
    """A timer for pytest-benchmark that stands still but for ``advance``."""

    def __init__(self, samples_s: Sequence[float] = ()) -> None:
        self.now_s, self.samples_s = 0.0, iter(samples_s)

    def __call__(self) -> float:
        return self.now_s

    def advance(self) -> None:
        self.now_s += next(self.samples_s)


class KernelBenchmark:
    """What the fixture ``kernel_benchmark`` is."""

    def __init__(self, device: Any, benchmark: Any, clock: VirtualClock, config: pytest.Config, name: str) -> None:
        self._device, self._benchmark, self._clock, self._config, self._name = device, benchmark, clock, config, name

    def __call__(self, kernel: str | Kernel, settings: Settings | None = None, **shape: int) -> Measurement:
        """Measures a kernel at a shape, as ``tokenfab bench`` does, and hands it to pytest-benchmark.

        Args:
            kernel: a name of the registry ("gemm/mxfp4-bf16"), or a row of its kind.
            settings: of the timing core; None: its own, with the seconds of ``--tokenfab-budget``.
            shape: the op's sizes, all of them.

        Raises:
            ValueError: an unknown kernel or GPU. ``MethodUnavailable``: a kernel that cannot be timed so.
        """
        from ..bench.campaign import gpu_of, measure_target
        from ..bench.measurement import Settings
        from ..bench.targets import Target

        row = find_kernel(kernel) if isinstance(kernel, str) else kernel
        gpu = gpu_of(self._device.properties, self._config.option.tokenfab_gpu)
        budget_s = self._config.option.tokenfab_budget
        record = measure_target(
            Target(row, tuple(shape.items()), (self._name,)), self._device, gpu,
            settings=settings or Settings(budget_s=budget_s, energy_s=None),
            buffers_on=getattr(self._device, "buffers_on", "cuda"),
        )  # fmt: skip
        return self.record(record)

    def record(self, record: Record) -> Measurement:
        """Hands a record to pytest-benchmark: its blocks as rounds, what it says as ``extra_info``."""
        from ..bench.sample import Sample
        from ..bench.sides import EXTRA

        measurement = record.measurement
        if measurement.invalid:
            pytest.fail(f"{record.point.op}: no time: {'; '.join(measurement.invalid)}", pytrace=False)
        times_s = [block.time_s for block in measurement.kept]
        self._clock.samples_s = iter(times_s)
        self._benchmark.pedantic(self._clock.advance, rounds=len(times_s), iterations=1)
        self._benchmark.extra_info.update(
            {EXTRA: Sample.of(record, self._name).to_dict(), **facts(record, median(times_s), self._config)}
        )
        return measurement


def facts(record: Record, time_s: float, config: pytest.Config) -> dict[str, Any]:
    """What a reader of pytest-benchmark's JSON wants to see: SI units, as the names say."""
    from ..bench.gpus import get_gpu
    from ..bench.places import places_of
    from ..costing.kernel_price import usd_per_mtok
    from ..costing.prices import price_lookup

    point, measurement = record.point, record.measurement
    models = config.option.tokenfab_model.split(",")
    price = price_lookup(config.option.tokenfab_usd_per_gpu_hour, config.option.tokenfab_tier)
    places = places_of(point.op, point.shape, models, get_gpu(point.gpu))
    return {
        "gpu": point.gpu,
        "bytes_per_s": measurement.bytes / time_s,
        "flops_per_s": measurement.flops / time_s,
        "roofline_fraction": measurement.roofline_fraction,
        "anchor_ratio": measurement.anchor_ratio,
        "flags": list(measurement.flags),
        "tokens_per_s_per_gpu_of_this_kernel_alone": {
            str(place): place.tokens_per_step / (place.calls_per_step * time_s) for place in places
        },
        "usd_per_mtok": {str(place): usd_per_mtok(time_s, place, price(point.gpu)) for place in places},
    }


def find_kernel(name: str) -> Kernel:
    """The registry's or a library's kernel called ``name``.

    Raises:
        ValueError: there is none; the message names those of the same op.
    """
    from ..bench.peers import COPY, PEERS
    from ..kernels.registry import KERNELS

    known = {kernel.name: kernel for kernel in (*KERNELS, *PEERS, COPY)}
    if name not in known:
        alike = [each for each in known if each.split("/")[0] == name.split("/")[0]] or list(known)
        raise ValueError(f"kernel: expected one of {', '.join(alike)}; got {name!r}")
    return known[name]


@pytest.fixture
def kernel_benchmark(request: pytest.FixtureRequest) -> KernelBenchmark:
    """Times a kernel on the GPU for pytest-benchmark: ``kernel_benchmark("gemm/mxfp4-bf16", m=64, n=..., k=...)``."""
    if not request.config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("kernel_benchmark: expected pytest-benchmark installed and on; got none")
    device = request.getfixturevalue("tokenfab_device")
    clock = VirtualClock()
    request.node.add_marker(pytest.mark.benchmark(timer=clock))
    return KernelBenchmark(device, request.getfixturevalue("benchmark"), clock, request.config, request.node.nodeid)
