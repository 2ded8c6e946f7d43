"""Whether a kernel is right, without timing it: at small shapes, on the GPU where there is one, else on the CPU.

The checks are the timing core's own (``case.Checker``): every call onto poison, the inputs' checksums, outputs on new
inputs. On the CPU, Triton's kernels run on its interpreter, repaired (``interpreter.py``); what that takes says nothing
about a GPU, so nothing is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from ..kernels.registry import Kernel, Shape
from .device import MethodUnavailable
from .measurement import Check

_GQA = {"head_dim": 64, "page_size": 16}
_MLA = {"kv_lora_rank": 256, "rope_dim": 32, "page_size": 16}
_EXPERTS = {"top_k": 2, "num_experts": 8, "load": 0}
_QUANTIZED = ({"rows": 5, "columns": 192}, {"rows": 17, "columns": 416})
SMALL_SHAPES: Mapping[str, tuple[dict[str, int], ...]] = {
    "gemm": ({"m": 3, "n": 160, "k": 256}, {"m": 17, "n": 136, "k": 416}),
    "moe": (
        {"num_tokens": 5, "hidden": 128, "inter": 64, "ep": 1} | _EXPERTS,
        {"num_tokens": 9, "hidden": 192, "inter": 128, "ep": 2} | _EXPERTS,
    ),
    "attention": (
        {"batch": 2, "length": 37, "num_heads": 4, "num_kv_heads": 2, "window": 0, "q_len": 1} | _GQA,
        {"batch": 3, "length": 50, "num_heads": 6, "num_kv_heads": 1, "window": 20, "q_len": 2} | _GQA,
    ),
    "mla": (
        {"batch": 2, "length": 37, "num_heads": 4, "q_len": 1} | _MLA,
        {"batch": 1, "length": 50, "num_heads": 16, "q_len": 2} | _MLA,
    ),
    "rope_append": ({"num_tokens": 5, "num_heads": 4, "num_kv_heads": 2} | _GQA,),
    "mla_append": ({"num_tokens": 5, "num_heads": 4} | _MLA,),
    "quantize": _QUANTIZED,
    "rms_norm_quantize": _QUANTIZED,
    "swiglu_quantize": _QUANTIZED,
}
"""Per op, with tails where the formats allow; no larger than the interpreter can run in seconds."""


class CheckedShape(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one shape. ``check``: None where the kernel could not run, for the ``reason``."""

    shape: dict[str, int]
    check: Check | None
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.check is not None and self.check.passed

    @property
    def verdict(self) -> str:
        return self.reason if self.check is None else "; ".join(self.check.problems) or "ok"


def use_interpreter() -> str:
    """Makes Triton run kernels on the CPU, from now on and in this process; before any kernel is imported.

    Returns: how, in words.

    Raises:
        MethodUnavailable: torch, Triton or ml_dtypes is missing, or Triton was imported before.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import torch
        import triton

        from . import interpreter
    except ImportError as error:
        raise MethodUnavailable(f"{error.name}: expected it installed, to run kernels on the CPU") from None
    if type(triton.language.cdiv).__name__ == "JITFunction":
        raise MethodUnavailable("triton: expected it not to be imported before its interpreter was chosen")
    interpreter.install()
    return f"on the CPU with Triton {triton.__version__}'s interpreter and torch {torch.__version__}"


def buffers_device() -> str:
    """torch's device for buffers that a kernel makes: the GPU, or the CPU with Triton's interpreter.

    Raises:
        MethodUnavailable: as ``use_interpreter``.
    """
    import torch

    if torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
        return "cuda"
    use_interpreter()
    return "cpu"


def check_device() -> tuple[Any, str, str]:
    """(what captures and waits, torch's device, where in words): the GPU, or the CPU where there is none.

    Raises:
        MethodUnavailable: as ``use_interpreter`` and ``CudaDevice``.
    """
    from .cuda_device import CudaDevice
    from .device import NoGpu

    try:
        device = CudaDevice()
    except NoGpu:
        where = use_interpreter()
        return cpu_device(), "cpu", where
    return device, "cuda", f"on {device.properties.name}"


def check_kernel(
    kernel: Kernel, shapes: Sequence[Shape], device: Any, buffers_on: Any, *, seed: int = 0,
    done: Callable[[CheckedShape], None] = lambda checked: None,
) -> list[CheckedShape]:  # fmt: skip
    """The check that comes before and after timing, at each shape.

    Args:
        device: what captures and waits: ``CpuDevice()``, or a ``CudaDevice``. buffers_on: torch's device.
    """
    checked = []
    for shape in shapes:
        try:
            each = CheckedShape(shape=dict(shape), check=_check(kernel, shape, device, buffers_on, seed))
        except MethodUnavailable as error:
            each = CheckedShape(shape=dict(shape), check=None, reason=str(error))
        checked.append(each)
        done(each)
    return checked


def _check(kernel: Kernel, shape: Shape, device: Any, buffers_on: Any, seed: int) -> Check:
    from .case import Checker, make_sets
    from .cases import make_case
    from .gpus import get_gpu

    case = make_case(kernel, shape, get_gpu("h100"), buffers_on)  # of which only floors are taken, and no times here
    policy = "cold_weights" if case.weight_bytes else "hot"
    sets = make_sets(case, device, policy, 2 if case.weight_bytes else 1, seed)
    checker = Checker(case, device, sets, seed)
    check = checker.before()
    if not check.passed_before:
        return check
    return checker.after(check, [device.capture(checker.calls(len(sets)))])


def cpu_device() -> Any:
    """A device for the checker alone: the CPU, whose work is done when a call returns."""
    from .cuda_device import TorchBuffers

    class _Replayed:
        def __init__(self, calls: Sequence[Callable[[], None]]) -> None:
            self._calls = calls

        def launch(self) -> None:
            for call in self._calls:
                call()

    class _Cpu(TorchBuffers):
        def capture(self, calls: Sequence[Callable[[], None]]) -> _Replayed:
            return _Replayed(list(calls))

        def synchronize(self) -> None: ...

    return _Cpu()
