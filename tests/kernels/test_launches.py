"""What the wrappers launch, Triton accepts: every kernel through its own launcher, for an absent Hopper GPU.

The script takes any architecture; code is compiled for all of them by ``test_matmul_points.py`` and its like.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "launch_without_gpu.py"
ROUTE = ["_route_kernel", "_schedule_kernel"]
PLANNED, COMBINED = ["_plan_kernel"], ["_combine_parts_kernel"]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """Kernel to what it launched; matmuls at few and at many tokens."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(SCRIPT), "sm_90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[list[str]]] = {}
    for line in done.stdout.splitlines():
        each = json.loads(line)
        assert each["problem"] == "", each
        found.setdefault(each["name"], []).append(each["launched"])
    return found


def test_dense_matmuls(launches: dict[str, list[list[str]]]) -> None:
    assert launches["gemm/fp8_block-fp8_group"] == [["_fp8_few_tokens_kernel"], ["_fp8_many_tokens_kernel"]]
    assert launches["gemm/mxfp4-bf16"] == [["_w4a16_kernel"]] * 2
    assert launches["gemm/mxfp4-fp8_group"] == [["_w4a8_kernel"]] * 2
    assert launches["gemm/mxfp4-mxfp8"] == [["_block_scaled_kernel"]] * 2


def test_attention_and_its_cache(launches: dict[str, list[list[str]]]) -> None:
    """The plan is made with the activations, once for all layers of a step."""
    for format in ("bf16", "fp8", "fp8_row", "mxfp4", "nvfp4"):
        assert launches[f"attention/{format}-bf16"] == [[*PLANNED, "_paged_attention_kernel", *COMBINED]] * 2
        assert launches[f"rope_append/{format}"] == [["_append_kv_kernel"]]
    for format in ("bf16", "fp8", "fp8_row"):
        assert launches[f"mla/{format}-bf16"] == [[*PLANNED, "_mla_attention_kernel", *COMBINED]] * 2
        assert launches[f"mla_append/{format}"] == [["_append_mla_kernel"]] * 2


def test_expert_layers_take_few_launches(launches: dict[str, list[list[str]]]) -> None:
    layers = {name: made for name, made in launches.items() if name.startswith("moe/")}
    assert len(layers) >= 10
    for name, made in layers.items():
        for kernels in made:
            assert kernels[:2] == ROUTE, name
            assert kernels[-1] == "_combine_kernel", name
            assert 5 <= len(kernels) <= 7, name
    twice = ["_grouped_kernel", "_grouped_kernel"]
    (block,) = layers["moe/fp8_block-fp8_group"]
    assert block == [*ROUTE, "_quantize_kernel", *twice, "_combine_kernel"]  # h is quantized by gate-up itself
    assert layers["moe/mxfp4-bf16"][0] == [*ROUTE, "_grouped_w4a16_kernel", "_grouped_w4a16_kernel", "_combine_kernel"]
