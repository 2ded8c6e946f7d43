"""Every matmul of the registry: exact on representable inputs, within its tolerance on random ones, at every shape.

Also what else a row says: bytes and flops as the decode plan counts them, sources that are there, points that compile
(``test_matmul_points.py``), a tile; and that the tolerance is not so wide that wrong kernels pass. Quantizers:
``test_quantize_runs.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenfab.bench.ops import Gemm
from tokenfab.kernels.formats import get_format
from tokenfab.kernels.quantize_points import QUANTIZE_OPS
from tokenfab.kernels.reference import error
from tokenfab.kernels.registry import KERNELS, Kernel, find_kernels, find_points
from tokenfab.kernels.routing_points import routing_points

GEMMS = find_kernels("gemm")
# odd n and a tail of k beyond every tile; 32 divides k, as MX and NVFP4 blocks need
SHAPES = [{"m": m, "n": n, "k": k} for m, n, k in
          [(1, 257, 416), (3, 131, 1312), (16, 301, 288), (64, 129, 544), (65, 257, 160), (257, 131, 288)]]  # fmt: skip


def by_name(kernel: Kernel) -> str:
    return kernel.name


def run(kernel: Kernel, shape: dict[str, int], device: torch.device, dtype: torch.dtype, *, is_exact: bool) -> Any:
    """(y, expected), the output poisoned before the launch."""
    if device.type == "cuda" and 10 * torch.cuda.get_device_capability()[0] < kernel.min_capability // 10 * 10:
        pytest.skip(f"{kernel.name} needs compute capability {kernel.min_capability / 10}")
    kernel_run = kernel.load()
    weights, activations = (
        make(shape, shape["m"], device, is_exact=is_exact)
        for make in (kernel_run.make_weights, kernel_run.make_activations)
    )
    output = kernel_run.make_output(shape, device).to(dtype).fill_(float("nan"))
    kernel_run.launch(weights, activations, output)
    return output, kernel_run.reference(shape, weights, activations)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", GEMMS, ids=by_name)
def test_r11_exact_on_representable_inputs(kernel: Kernel, shape: dict[str, int], device: torch.device) -> None:
    y, expected = run(kernel, shape, device, torch.float32, is_exact=True)
    assert torch.equal(y.double(), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", GEMMS, ids=by_name)
def test_random_inputs_within_the_tolerance(kernel: Kernel, shape: dict[str, int], device: torch.device) -> None:
    y, expected = run(kernel, shape, device, torch.bfloat16, is_exact=False)
    assert error(y, expected) <= kernel.tolerance
    assert error(y.double() * 1.03, expected) > kernel.tolerance
    worst = expected.abs().argmax()
    y.view(-1)[worst] *= 1.05
    assert error(y, expected) > kernel.tolerance


@pytest.mark.parametrize("kernel", GEMMS, ids=by_name)
def test_float32_output_loses_only_accumulation(kernel: Kernel, device: torch.device) -> None:
    """Hopper's FP8 units keep 13 fraction bits of a running sum of 128; everything else sums in float32."""
    y, expected = run(kernel, SHAPES[1], device, torch.float32, is_exact=False)
    limit = 1e-4 if device.type == "cpu" else 0.2
    assert error(y, expected) <= limit


@pytest.mark.parametrize("kernel", GEMMS, ids=by_name)
def test_work_is_what_the_decode_plan_counts(kernel: Kernel) -> None:
    shape = {"m": 33, "n": 384, "k": 256}
    work, op = kernel.work(shape), Gemm(**shape, weight=kernel.weight, activation=kernel.activation)
    denser = 0.125 * 384 * 256 / 8 if kernel.runnable.endswith("W4A8Matmul") else 0  # half a byte per scale
    assert work.weight_bytes + work.activation_bytes == pytest.approx(op.bytes - denser, abs=2)
    assert work.flops == op.flops


@pytest.mark.parametrize("kernel", KERNELS, ids=by_name)
def test_a_row_is_whole(kernel: Kernel, device: torch.device) -> None:
    assert all(kernel.source_texts().values())
    points = kernel.points()
    assert points
    assert all(point.name.startswith(f"{kernel.name}/") for point in points)
    made = set(kernel.source_texts())
    assert {f"{point.module.rsplit('.', 1)[1]}.py" for point in points} <= made
    assert all(get_format(name) for name in kernel.formats.values())
    assert list(kernel.formats) in (["weight", "activation"], ["activation"])


@pytest.mark.parametrize("kernel", GEMMS, ids=by_name)
def test_weights_are_all_the_bytes_that_work_claims(kernel: Kernel) -> None:
    """Buffers hold no less than a call must move, and hardly more where nothing is padded."""
    shape = {"m": 16, "n": 512, "k": 512}
    kernel_run, work = kernel.load(), kernel.work(shape)
    held = sum(part.nbytes for part in kernel_run.make_weights(shape, 1, "cpu").values())
    assert work.weight_bytes <= held <= 1.01 * work.weight_bytes + 4 * shape["n"] + 64
    activations = kernel_run.make_activations(shape, 1, "cpu")
    held = sum(part.nbytes for part in activations.values()) + kernel_run.make_output(shape, "cpu").nbytes
    assert work.activation_bytes <= held <= work.activation_bytes + 4 * shape["m"] + 64


def test_names_are_unique_and_found() -> None:
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)
    assert [k.name for k in find_kernels("gemm", ["nvfp4"])] == ["gemm/nvfp4-bf16", "gemm/nvfp4-nvfp4"]
    assert [k.name for k in find_kernels(None, ["mxfp4-mxfp8"])] == ["gemm/mxfp4-mxfp8", "moe/mxfp4-mxfp8"]
    assert [k.name for k in find_kernels("quantize", ["fp8_group"])] == ["quantize/fp8_group"]
    by_format = [k.name for k in find_kernels(None, ["mxfp8"])]
    assert by_format == ["gemm/mxfp8-mxfp8", "moe/mxfp8-mxfp8", *(f"{op}/mxfp8" for op in QUANTIZE_OPS)]
    with pytest.raises(ValueError, match="op: expected one of gemm.*; got 'gem'"):
        find_kernels("gem")
    with pytest.raises(ValueError, match="format: expected one of fp8-fp8, .*; got 'int4'"):
        find_kernels("gemm", ["int4"])
    with pytest.raises(ValueError, match="format: expected one of fp8, fp8_row, .*, nvfp4; got 'fp8_block'"):
        find_kernels("quantize", ["fp8_block"])


def test_points_of_an_expert_layer_hold_its_routing() -> None:
    names = {point.name.split("/")[0] for point in find_points("moe", ["mxfp4-bf16"])}
    assert names == {"moe", *(point.name.split("/")[0] for point in routing_points())}
    assert {point.name.split("/")[0] for point in find_points("gemm")} == {"gemm"}
    everything = [(point.name, point.archs) for point in find_points()]
    assert len(set(everything)) == len(everything)


def test_distance_has_a_limit_for_the_worst_and_one_for_all() -> None:
    expected = torch.tensor([1.0, -1.0]).repeat(500)
    assert error(expected * 1.003, expected) == pytest.approx(0.75, rel=1e-3)  # of an RMS of 4e-3
    assert error(expected * 1.006, expected) > 1
    one = expected.clone()
    one[3] *= 1.01
    assert error(one, expected) == pytest.approx(0.5, rel=1e-3)  # of a largest of 2e-2
    one[3] = expected[3] * 1.03
    assert error(one, expected) > 1
    one[3] = float("nan")
    assert not error(one, expected) <= 1
    assert error(torch.empty(0, 3), torch.empty(0, 3)) == 0
    with pytest.raises(ValueError, match=r"y: expected shape \(1000,\); got \(999,\)"):
        error(expected[1:], expected)
