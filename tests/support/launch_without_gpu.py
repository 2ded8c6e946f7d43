"""Kernels launched through their wrappers as on a GPU, up to the code of its warps, on a machine without one.

``python launch_without_gpu.py sm_90`` runs all but the quantizers of the registry with Triton's own launcher,
not the interpreter: it binds arguments, specialises, checks types and lays tensors out over warps,
and stops there, since what follows is compiled at the kernels' points. Prints one JSON line per kernel: its name, the
kernels that it launched in order, and what went wrong.

Triton's driver is replaced by one that only knows an architecture.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import torch
import triton
from tokenfab.kernels.registry import find_kernels
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

OPS = ("gemm", "moe", "attention", "mla", "rope_append", "mla_append")

MODULES = (
    "attention_plan", "kv_append", "mla_append", "mla_attention", "paged_attention",
    "block_scaled_matmul", "fp8_matmul", "grouped_block_scaled", "grouped_experts", "grouped_fp4", "grouped_matmul",
    "grouped_parts", "matmul_runs", "moe_schedule", "quantize", "routing", "split_k", "w4a16_matmul", "w4a8_matmul",
)  # fmt: skip


class Driver:
    """As much of a driver as a launch asks for before it launches."""

    def __init__(self, arch: str) -> None:
        self._target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


class Compiling:
    """A kernel whose launches end before its code."""

    launched: list[str] = []  # noqa: RUF012

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self._kernel.warmup(*arguments, grid=grid, **options)
            Compiling.launched.append(self._kernel.__name__)

        return launch


def _no_code(self: Any, source: Any, metadata: dict[str, Any], *_: Any) -> str:
    """In place of LLVM: what a launch reads of a kernel that has no code."""
    sizes = dict.fromkeys(("shared", "tmem_size", "global_scratch_size", "profile_scratch_size"), 0)
    metadata |= {**sizes, "global_scratch_align": 1, "profile_scratch_align": 1, "name": "kernel"}
    return ""


def shapes_of(op: str) -> list[dict[str, int]]:
    if op == "gemm":
        return [{"m": m, "n": 256, "k": 512} for m in (5, 100)]
    if op == "attention":
        sizes = {"batch": 2, "length": 100, "num_heads": 8, "num_kv_heads": 2, "page_size": 16}
        wide = {"head_dim": 64, "window": 40, "q_len": 4, "page_size": 128}
        return [sizes | {"head_dim": 128, "window": 0, "q_len": 1}, sizes | wide]
    if op == "rope_append":
        return [{"num_tokens": 5, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16}]
    if op in ("mla", "mla_append"):
        sizes = {"num_heads": 16, "kv_lora_rank": 512, "rope_dim": 64, "page_size": 64}
        return [sizes | {"num_tokens": 5, "batch": 2, "length": 100, "q_len": q_len} for q_len in (1, 2)]
    sizes = {"hidden": 256, "inter": 256, "top_k": 2, "num_experts": 4, "ep": 2, "load": 0}
    return [sizes | {"num_tokens": 9}]


def main(arch: str) -> None:
    no_gpu: Any = Driver(arch)
    driver.set_active(no_gpu)
    CompiledKernel._init_handles = lambda self: None  # the module is not loaded
    backend: Any = CUDABackend
    backend.make_llir = _no_code
    backend.make_ptx = lambda *_: ""
    backend.make_cubin = lambda *_: b""
    for name in MODULES:
        module = importlib.import_module(f"tokenfab.kernels.{name}")
        for attribute, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction) and attribute.endswith("_kernel"):
                setattr(module, attribute, Compiling(value))
        if hasattr(module, "arch_of"):
            setattr(module, "arch_of", lambda device: arch)  # noqa: B010
    for kernel in (kernel for op in OPS for kernel in find_kernels(op)):
        if kernel.min_capability > int(arch.removeprefix("sm_")):
            continue
        for shape in shapes_of(kernel.op):
            Compiling.launched, problem = [], ""
            try:
                run = kernel.load()
                weights, activations = run.make_weights(shape, 0, "cpu"), run.make_activations(shape, 0, "cpu")
                run.launch(weights, activations, run.make_output(shape, torch.device("cpu")))
            except Exception as error:  # noqa: BLE001
                problem = f"{type(error).__name__}: {error}"[:500]
            print(json.dumps({"name": kernel.name, "launched": Compiling.launched, "problem": problem}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
