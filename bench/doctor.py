"""What of this machine makes a measurement possible, trustworthy or neither: findings, each ok, warn or fail with why.

``fail``: nothing can be timed until it is put right. ``warn``: times can be taken, and what a reader of them must
know. Without a GPU it says what is missing and what of tokenfab runs all the same. Nothing is changed: no clock, no
limit, no mode.

NVML comes in as a parameter (the module ``pynvml``), so that findings can be had of a GPU that is not there. Units as
NVML gives them: MHz, mW, bytes; shown in MHz, W, GiB.

Source: NVML API reference (clock event reasons, MIG and persistence modes, power limits).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..kernels.registry import KERNELS
from .device import THROTTLE_MASK, THROTTLES, DeviceProperties
from .gpus import DEVICE_NAMES, GPUS
from .peers import PEERS, absence
from .record import environment

OK, WARN, FAIL = "ok", "warn", "fail"

WITHOUT_GPU = (
    "without one, `tokenfab inspect` compiles the kernels ahead of time and `tokenfab cost` prices published ones"
)
_PACKAGES = {"torch": FAIL, "triton": FAIL, "numpy": FAIL, "nvidia-ml-py": FAIL}
_TOOLS = {
    "compute-sanitizer": "memcheck and racecheck of the kernels are skipped",
    "nvdisasm": "`tokenfab inspect` has no SASS to read",
    "cuobjdump": "`tokenfab inspect` has no resource usage to read",
}
_MAX_BUSY_PERCENT, _MIN_FREE = 5, 0.9
_LEAST_FREE_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``status``: OK, WARN or FAIL; ``detail``: what was seen, and what follows from it."""

    name: str
    status: str
    detail: str


def examine(
    nvml: Any, *, environ: Mapping[str, str] = os.environ, out: Path | None = None,
    which: Callable[[str], str | None] = shutil.which,
) -> list[Finding]:  # fmt: skip
    """All findings. ``nvml``: the module pynvml, or None where it is not installed. ``out``: where records would go."""
    found = [*_software(environ), *_gpu(nvml, environ), *_tools(which), *_peers(), *_machine(out)]
    if any(each.name == "GPU" and each.status == FAIL for each in found):
        found.append(Finding("what runs", OK, WITHOUT_GPU))
    return found


def installed_nvml() -> Any:
    """The module pynvml, or None."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml  # pyright: ignore[reportMissingImports]

    return pynvml


def is_ready(findings: list[Finding]) -> bool:
    """Whether something can be timed."""
    return not any(each.status == FAIL for each in findings)


# -- software --------------------------------------------------------------------------------------


def _software(environ: Mapping[str, str]) -> Iterator[Finding]:
    for package, status in _PACKAGES.items():
        version = _version(package)
        if version is None:
            yield Finding(package, status, "not installed; pip install 'tokenfab[kernels]'")
        elif package == "torch" and "+cpu" in version:
            yield Finding(package, FAIL, f"{version}: built without CUDA")
        else:
            yield Finding(package, OK, version)
    if environ.get("TRITON_INTERPRET", "").lower() not in ("", "0", "false", "off", "no", "n"):
        yield Finding("TRITON_INTERPRET", FAIL, "set; the interpreter's times on the CPU are no kernel speeds")
    for name in ("CUDA_LAUNCH_BLOCKING", "PYTORCH_NO_CUDA_MEMORY_CACHING"):
        if environ.get(name, "") not in ("", "0"):
            yield Finding(name, WARN, f"{environ[name]}: work is not enqueued ahead; unset it")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- the GPU ---------------------------------------------------------------------------------------


class NoDriver(ValueError):
    """There is no NVIDIA GPU to ask."""


def _handle(nvml: Any, environ: Mapping[str, str]) -> tuple[Any, int]:
    """The GPU that CUDA calls 0, and how many there are.

    Raises:
        NoDriver: none, or none that is visible.
    """
    if nvml is None:
        raise NoDriver("NVML cannot be asked: nvidia-ml-py is not installed")
    visible = environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
        if visible.isdigit() and int(visible) < count:
            return nvml.nvmlDeviceGetHandleByIndex(int(visible)), count
        if visible.startswith("GPU-"):
            return nvml.nvmlDeviceGetHandleByUUID(visible), count
    except nvml.NVMLError as error:
        raise NoDriver(f"no NVIDIA driver that answers: {error}") from None
    raise NoDriver(f"CUDA_VISIBLE_DEVICES: expected one of the driver's {count} GPUs first; got {visible!r}")


def properties(nvml: Any, environ: Mapping[str, str] = os.environ) -> DeviceProperties:
    """The GPU that CUDA calls 0 and its software, without a CUDA context; what that alone tells is empty.

    Raises:
        NoDriver: there is none.
    """
    handle = _handle(nvml, environ)[0]
    return DeviceProperties(
        name=str(nvml.nvmlDeviceGetName(handle)), uuid=str(nvml.nvmlDeviceGetUUID(handle)), l2_bytes=0,
        driver=str(nvml.nvmlSystemGetDriverVersion()), cuda="", torch=_version("torch") or "",
        triton=_version("triton") or "",
    )  # fmt: skip


def _gpu(nvml: Any, environ: Mapping[str, str]) -> Iterator[Finding]:
    try:
        handle, count = _handle(nvml, environ)
    except NoDriver as error:
        yield Finding("GPU", FAIL, str(error))
        return
    ask = _Asker(nvml, handle)
    yield from _identity(ask, count)
    yield from _modes(ask)
    yield from _clocks(ask)
    yield from _others(ask)


class _Asker:
    """NVML's answers about one GPU; None where it has none, which is a finding elsewhere."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle

    def __call__(self, function: str, *arguments: Any, whole: bool = False) -> Any:
        """``function`` of the GPU, or of the whole driver."""
        try:
            return getattr(self.nvml, function)(*(() if whole else (self.handle,)), *arguments)
        except self.nvml.NVMLError:
            return None


def _identity(ask: _Asker, count: int) -> Iterator[Finding]:
    name = str(ask("nvmlDeviceGetName"))
    known = DEVICE_NAMES.get(name)
    if known is None:
        yield Finding("GPU", WARN, f"{name}: not a known name; say which row of `tokenfab gpus` it is with --gpu")
    else:
        yield Finding("GPU", OK, f"{name}: {known} ({GPUS[known].title})" + (f", 1 of {count}" if count > 1 else ""))
    yield Finding("driver", OK, str(ask("nvmlSystemGetDriverVersion", whole=True)))
    capability = ask("nvmlDeviceGetCudaComputeCapability")
    if capability is not None:
        number = 10 * capability[0] + capability[1]
        kernels = [kernel for kernel in KERNELS if kernel.min_capability <= number]
        status = OK if kernels else FAIL
        yield Finding("kernels", status, f"{len(kernels)} of {len(KERNELS)} run at compute capability {number / 10:g}")


def _modes(ask: _Asker) -> Iterator[Finding]:
    mig = ask("nvmlDeviceGetMigMode")
    if mig is not None and mig[0]:
        yield Finding("MIG", FAIL, "on: a slice of the GPU has neither its bandwidth nor its L2")
    else:
        yield Finding("MIG", OK, "off" if mig is not None else "not supported")
    persistence = ask("nvmlDeviceGetPersistenceMode")
    if persistence is not None and not persistence:
        yield Finding("persistence", WARN, "off: the driver lets go of the GPU between processes; passes start cold")
    elif persistence is not None:
        yield Finding("persistence", OK, "on")
    limit, default = ask("nvmlDeviceGetEnforcedPowerLimit"), ask("nvmlDeviceGetPowerManagementDefaultLimit")
    if limit is None or default is None:
        yield Finding("power limit", WARN, "cannot be read")
    elif limit < default:
        yield Finding("power limit", WARN, f"{limit / 1e3:.0f} W, less than the default {default / 1e3:.0f} W")
    else:
        yield Finding("power limit", OK, f"{limit / 1e3:.0f} W")
    if ask("nvmlDeviceGetTotalEnergyConsumption") is None:
        yield Finding("energy counter", FAIL, "cannot be read; the timing core needs it")


def _clocks(ask: _Asker) -> Iterator[Finding]:
    now, most = (ask(f"nvmlDeviceGet{kind}ClockInfo", ask.nvml.NVML_CLOCK_SM) for kind in ("", "Max"))
    if now is None:
        yield Finding("clocks", FAIL, "cannot be read; without them throttling is not seen")
    else:
        yield Finding("clocks", OK, f"SM {now} MHz now" + (f", {most} MHz at most" if most else ""))
    bits = ask("nvmlDeviceGetCurrentClocksEventReasons")
    held = [text for bit, text in THROTTLES.items() if bits and bits & bit]
    if bits is None:
        yield Finding("throttling", FAIL, "cannot be read")
    elif bits & THROTTLE_MASK:
        yield Finding("throttling", WARN, f"now, idle or not: {', '.join(held)}")
    else:
        yield Finding("throttling", OK, "none now")
    temperature = ask("nvmlDeviceGetTemperature", ask.nvml.NVML_TEMPERATURE_GPU)
    if temperature is not None:
        yield Finding("temperature", OK, f"{temperature} °C")


def _others(ask: _Asker) -> Iterator[Finding]:
    processes = [p for p in ask("nvmlDeviceGetComputeRunningProcesses") or () if p.pid != os.getpid()]
    if processes:
        listed = ", ".join(str(process.pid) for process in processes[:5])
        yield Finding("other processes", WARN, f"{len(processes)} compute on this GPU: {listed}")
    else:
        yield Finding("other processes", OK, "none seen")
    memory = ask("nvmlDeviceGetMemoryInfo")
    if memory is not None:
        status = OK if memory.free >= _MIN_FREE * memory.total else WARN
        yield Finding("memory", status, f"{memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free")
    busy = ask("nvmlDeviceGetUtilizationRates")
    if busy is not None and busy.gpu > _MAX_BUSY_PERCENT:
        yield Finding("utilization", WARN, f"{busy.gpu} % before anything was started here")


# -- around it -------------------------------------------------------------------------------------


def find_tool(name: str, which: Callable[[str], str | None] = shutil.which) -> str | None:
    """A tool of the CUDA toolkit: on the path, in CUDA_HOME, or the copy that comes with Triton."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name)
    return which(name) or next((str(place) for place in places if os.access(place, os.X_OK)), None)


def _tools(which: Callable[[str], str | None]) -> Iterator[Finding]:
    for name, without in _TOOLS.items():
        place = find_tool(name, which)
        yield Finding(name, OK, place) if place else Finding(name, WARN, f"not found: {without}")


def _peers() -> Iterator[Finding]:
    for peer in PEERS:
        reason = absence(peer)
        yield Finding(f"peer {peer.name}", WARN if reason else OK, reason or peer.title)


def _machine(out: Path | None) -> Iterator[Finding]:
    nothing = DeviceProperties(name="", uuid="", l2_bytes=1, driver="", cuda="", torch="", triton="")
    here = environment(nothing)
    if here.git_sha is None:
        yield Finding("commit", WARN, "not a checkout: records will not name one")
    elif here.git_dirty:
        yield Finding("commit", WARN, f"{here.git_sha[:9]}, with changes that are in no commit")
    else:
        yield Finding("commit", OK, here.git_sha[:9])
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    status = WARN if load > cores else OK
    yield Finding("CPU", status, f"{cores} cores, load {load:.1f}")
    folder = next((each for each in (out, *out.absolute().parents) if each.exists()), None) if out else None
    if folder is not None:
        free, writable = shutil.disk_usage(folder).free, os.access(folder, os.W_OK)
        status = OK if writable and free > _LEAST_FREE_BYTES else FAIL
        yield Finding("records", status, f"{out}: {free / 2**30:.0f} GiB free{'' if writable else ', not writable'}")
