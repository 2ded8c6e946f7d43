"""Kernels that are wrong in one place, and whether the tests notice: run in a copy of the package, by ``test_mutants``.

``python mutants.py COPY``, the folder that holds the copied package, prints one JSON line per mutant: pytest's exit
status of its tests. The text of a mutant is put into the copy, a fork of this process, which has torch and Triton
loaded, runs the tests, and the text is put back.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

ROOMS = ("kernels", "bench", "costing", "commands", "tests")
LIMIT_S = 120
TESTS_FAILED = 1
"""Pytest's exit status; others are for what could not be run."""


@dataclass(frozen=True)
class Mutant:
    """``old``, which stands once in a file of kernels, becomes ``new``; ``tests`` are to fail then."""

    fault: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


_EXACT = "test_registry.py::test_r11_exact_on_representable_inputs"
_TAIL = "{'m': 1, 'n': 257, 'k': 416}"
MUTANTS = (
    Mutant("x1.2 scale", "fp8_matmul.py", "part = part * ws[:, None] * xs[None, :]",
           "part = part * ws[:, None] * xs[None, :] * 1.2",
           ("test_fp8_matmul.py::test_block_scales_change_at_row_and_column_128",)),
    Mutant("nibble swap in weights", "fp4_weights.py", "torch.stack([packed & 0xF, packed >> 4], dim=-1)",
           "torch.stack([packed >> 4, packed & 0xF], dim=-1)", (f"{_EXACT}[gemm/mxfp4-bf16-{_TAIL}]",)),
    Mutant("nibble swap in activations", "quantize.py", "codes = (low | (high << 4)).to(tl.uint8)",
           "codes = (high | (low << 4)).to(tl.uint8)", ("test_quantize.py::test_r08_edges[32-mxfp4-dtype0]",)),
    Mutant("lost K tail", "block_scaled_matmul.py",
           "last = tl.minimum(first + k_tiles_per_split, tl.cdiv(K, BLOCK_K))",
           "last = tl.minimum(first + k_tiles_per_split, K // BLOCK_K)", (f"{_EXACT}[gemm/mxfp8-mxfp8-{_TAIL}]",)),
    Mutant("lost part of K", "split_k.py", "for split in range(1, SPLITS):", "for split in range(2, SPLITS):",
           ("test_fp8_matmul.py::test_split_k_sums_every_part_once[3-row]",)),
    Mutant("dropped expert", "moe_schedule.py", "is_block = slots < tl.sum(blocks)",
           "is_block = slots + 1 < tl.sum(blocks)",
           ("test_moe_schedule.py::test_r05_loads_at_the_edge[one launch-16-one row each]",)),
    Mutant("dropped row", "grouped_parts.py", "(BLOCK,)) >= 0", "(BLOCK,)) > 0",
           ("test_grouped_experts.py::test_combine_adds_slots_in_order_and_reads_only_what_is_there",)),
    Mutant("swapped gate and up", "grouped_parts.py", "gate, up = tl.split(pairs)", "up, gate = tl.split(pairs)",
           ("test_moe_layer.py::test_layer_in_every_format[1-bf16]",)),
    Mutant("wrong window edge", "attention_parts.py", "tokens[:, None] >= ends[None, :] - window",
           "tokens[:, None] > ends[None, :] - window",
           ("test_paged_attention.py::test_a_window_has_its_tokens_and_no_others[bf16-16]",)),
    Mutant("lost sink", "attention_plan.py", "tl.exp2(lse - top) + tl.exp2(sink - top)", "tl.exp2(lse - top)",
           ("test_paged_attention.py::test_sinks_take_their_share",)),
    Mutant("off-by-one page", "attention_parts.py", "slots = (start + offs_n) // PAGE if",
           "slots = (start + offs_n + 1) // PAGE if",
           ("test_paged_attention.py::test_each_row_finds_its_token[bf16-16]",)),
    Mutant("scale of K for V", "paged_attention.py", "tl.load(scale_ptrs + PAGE,", "tl.load(scale_ptrs,",
           ("test_paged_attention.py::test_random_inputs[fp8_row-d64]",)),
    Mutant("rotation backwards", "kv_append.py", "tl.where(is_first, -1.0, 1.0)", "tl.where(is_first, 1.0, -1.0)",
           ("test_kv_append.py::test_the_rotation_is_that_of_complex_numbers[half]",)),
    Mutant("weights that do not sum to one", "routing.py", "tl.div_rn(weights, tl.sum(weights) + SUM_FLOOR)", "weights",
           ("test_routing.py::test_random_logits_against_the_reference[dtype0-deepseek-v3]",)),
)  # fmt: skip


def copy_package(source: Path, into: Path) -> Path:
    """The package, as ``tokenfab`` in a folder; its path."""
    package = into / "tokenfab"
    package.mkdir(parents=True)
    for room in ROOMS:
        shutil.copytree(source / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "pyproject.toml"):
        shutil.copy(source / name, package / name)
    return package


def mutated(text: str, mutant: Mutant) -> str:
    """
    Raises:
        ValueError: what is to change is not there, or stands there more than once.
    """
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file}: expected {mutant.old!r} once; got it {text.count(mutant.old)} times")
    return text.replace(mutant.old, mutant.new)


def run_tests(package: Path, tests: tuple[str, ...]) -> int:
    """Pytest's exit status in a fork; that of a signal is negative."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            signal.alarm(LIMIT_S)
            os.chdir(package)
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            status = _run_here(package, tests)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run_here(package: Path, tests: tuple[str, ...]) -> int:
    import pytest
    import tokenfab

    if Path(tokenfab.__file__).parent.resolve() != package.resolve():
        return 71  # another package's tests would say nothing of this one
    places = [str(package / "tests" / "kernels" / test) for test in tests]
    options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(package), "-c", str(package / "pyproject.toml")]
    return int(pytest.main([*options, *places]))


def main(package: Path) -> None:
    import hypothesis  # noqa: F401  once, and not in each fork
    import ml_dtypes  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import triton.language
    import triton.runtime.interpreter  # noqa: F401

    torch.set_num_threads(1)
    everything = tuple(test for mutant in MUTANTS for test in mutant.tests)
    print(json.dumps({"fault": "", "status": run_tests(package, everything)}), flush=True)
    for mutant in MUTANTS:
        file = package / "kernels" / mutant.file
        text = file.read_text()
        file.write_text(mutated(text, mutant))
        status = run_tests(package, mutant.tests)
        file.write_text(text)
        print(json.dumps({"fault": mutant.fault, "status": status}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
