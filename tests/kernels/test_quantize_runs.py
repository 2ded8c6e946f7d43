"""Every quantizer of the registry: no bit is wrong, at every shape, and a wrong one is seen.

Also what else a row says: bytes as they lie in the buffers, a tile. The kernels' edges: ``test_quantize.py``; how they
compile: ``test_quantize_points.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenfab.kernels import codec
from tokenfab.kernels.formats import get_format
from tokenfab.kernels.quantize_points import QUANTIZE_OPS
from tokenfab.kernels.quantize_runs import EPS, GLOBAL_SCALE
from tokenfab.kernels.reference import Quantized, error, rms_norm_ref
from tokenfab.kernels.registry import KERNELS, Kernel, Work, find_kernels

QUANTIZERS = [kernel for kernel in KERNELS if kernel.op in QUANTIZE_OPS]
SIZES = [(1, 32), (3, 160), (17, 1184), (2, 2880), (2, 4096 + 160)]
ODD_SIZES = [(5, 33), (2, 1185)]  # where no block must divide
CASES = [
    pytest.param(kernel, {"rows": rows, "columns": columns}, id=f"{kernel.name}-{rows}x{columns}")
    for kernel in QUANTIZERS
    for rows, columns in SIZES + ODD_SIZES
    if columns % get_format(kernel.activation).column_multiple == 0
]


def by_name(kernel: Kernel) -> str:
    return kernel.name


def run(kernel: Kernel, shape: dict[str, int], device: torch.device, *, is_exact: bool = False) -> tuple[Any, ...]:
    """(weights, activations, output, expected), the output poisoned before the launch."""
    if device.type == "cuda" and torch.cuda.get_device_capability() < divmod(kernel.min_capability, 10):
        pytest.skip(f"{kernel.name} needs compute capability {kernel.min_capability / 10}")
    kernel_run = kernel.load()
    weights, activations = (
        make(shape, shape["rows"], device, is_exact=is_exact)
        for make in (kernel_run.make_weights, kernel_run.make_activations)
    )
    output = kernel_run.make_output(shape, device)
    for part in output.values():
        as_bytes(part).fill_(0xFF)
    before = [part.clone() for part in (*weights.values(), *activations.values())]
    kernel_run.launch(weights, activations, output)
    for part, copy in zip((*weights.values(), *activations.values()), before, strict=True):
        assert torch.equal(part, copy)
    return weights, activations, output, kernel_run.reference(shape, weights, activations)


def as_bytes(part: torch.Tensor) -> torch.Tensor:
    return part.unsqueeze(-1).view(torch.uint8).view(-1)


def assert_same(output: dict[str, torch.Tensor], want: codec.QuantizedTensor) -> None:
    assert want.scale is not None
    assert torch.equal(as_bytes(output["data"]), as_bytes(want.data))
    assert torch.equal(as_bytes(output["scale"]), as_bytes(want.scale))


@pytest.mark.parametrize(("kernel", "shape"), CASES)
def test_no_bit_is_wrong(kernel: Kernel, shape: dict[str, int], device: torch.device) -> None:
    weights, activations, output, expected = run(kernel, shape, device)
    assert error(output, expected) == 0.0 == kernel.tolerance
    if kernel.op == "quantize":
        options = {"global_scale": weights["global_scale"]} if weights else {}
        assert_same(output, codec.quantize(activations["x"], kernel.activation, **options))


@pytest.mark.parametrize(("kernel", "shape"), [case for case in CASES if case.id and not case.id.startswith("swiglu")])
def test_exact_on_representable_inputs(kernel: Kernel, shape: dict[str, int], device: torch.device) -> None:
    """Sums of squares of integers have no order: the norm is that of plain float32, bit for bit."""
    weights, activations, output, expected = run(kernel, shape, device, is_exact=True)
    assert error(output, expected) == 0.0
    values = activations["x"]
    if kernel.op == "rms_norm_quantize":
        values = (values.float() + activations["residual"].float()).to(torch.bfloat16)
        assert torch.equal(output["residual"], values)
        values = rms_norm_ref(values, weights["norm"], EPS)
    options = {"global_scale": GLOBAL_SCALE} if "global_scale" in weights else {}
    assert_same(output, codec.quantize(values, kernel.activation, **options))


@pytest.mark.parametrize("kernel", QUANTIZERS, ids=by_name)
def test_what_is_wrong_is_seen(kernel: Kernel, device: torch.device) -> None:
    """Scales 20 % off, scales and codes one step off, swapped nibbles, a lost row, a lost tail, a stale residual."""
    shape = {"rows": 3, "columns": 2880}
    _, activations, output, expected = run(kernel, shape, device)

    def wrong(name: str, change: Any) -> float:
        changed = {part: values.clone() for part, values in output.items()}
        values = changed[name]
        raw = values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values
        raw.copy_(change(raw.clone()))
        return error(changed, expected)

    num_scales = output["scale"].numel()
    total = 3 * 2880 + num_scales + (2 * 3 * 2880 if "residual" in output else 0)
    if output["scale"].dtype == torch.float32:
        assert wrong("scale", lambda scale: scale * 1.2) >= num_scales / total
        # next to a scale's bound from a rounding that is open: 2^-8 of it
        assert wrong("scale", lambda scale: scale * (1 + 2.0**-7)) >= num_scales / total
    else:
        for step in (1, -1):
            assert wrong("scale", lambda scale, step=step: scale + step) >= 0.9 * num_scales / total
    assert wrong("data", lambda codes: codes ^ 1) >= 0.9 * 3 * 2880 / (2 if expected.format.packing else 1) / total
    assert wrong("data", lambda codes: codes ^ 0x88) >= 0.8 * 3 * 2880 / total
    if expected.format.packing:
        assert wrong("data", lambda codes: (codes >> 4) | (codes << 4)) > 0.3 * 3 * 2880 / total

    def lost(values: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        values[rows, columns] = 0
        return values

    assert wrong("data", lambda codes: lost(codes, slice(2, 3), slice(None))) > 0.25 * 3 * 2880 / total
    assert wrong("data", lambda codes: lost(codes, slice(None), slice(-32, None))) > 0
    if "residual" in output:
        assert wrong("residual", lambda _: activations["residual"]) > 0.3


@pytest.mark.parametrize("kernel", find_kernels("quantize"), ids=by_name)
def test_one_bit_is_seen(kernel: Kernel, device: torch.device) -> None:
    """Where nothing is computed before the codes, no bit is free."""
    shape = {"rows": 2, "columns": 160}
    _, _, output, expected = run(kernel, shape, device)
    for name, part in output.items():
        for place in (0, as_bytes(part).numel() // 2, as_bytes(part).numel() - 1):
            for bit in range(8):
                as_bytes(part)[place] ^= 1 << bit
                assert error(output, expected) > 0, (name, place, bit)
                as_bytes(part)[place] ^= 1 << bit
    assert error(output, expected) == 0


@pytest.mark.parametrize("format", ["fp8", "fp8_row", "fp8_group", "mxfp8", "mxfp4", "nvfp4"])
def test_an_open_rounding_allows_two_results_and_no_third(format: str) -> None:
    """BF16 values that may be either of two neighbours: the codec's result for each choice, and nothing further off."""
    generator = torch.Generator().manual_seed(1)
    low = torch.randn(4, 160, generator=generator).to(torch.bfloat16)
    bits = low.view(torch.int16)
    steps = torch.where(low > 0, 1, -1).to(torch.int16)
    high, beyond = (bits + steps).view(torch.bfloat16), (bits + 40 * steps).view(torch.bfloat16)
    options = {"global_scale": torch.tensor(0.25)} if format == "nvfp4" else {}
    expected = Quantized(get_format(format), low, high, options.get("global_scale"))
    choice = torch.rand(low.shape, generator=generator) < 0.5
    for values in (low, high, torch.where(choice, low, high)):
        made = codec.quantize(values, format, **options)
        assert made.scale is not None
        assert error({"data": made.data, "scale": made.scale}, expected) == 0
    made = codec.quantize(beyond, format, **options)
    assert made.scale is not None
    assert error({"data": made.data, "scale": made.scale}, expected) > 0.01


@pytest.mark.parametrize("format", ["fp8_group", "mxfp8", "nvfp4"])
def test_between_two_signs_lies_zero(format: str) -> None:
    """A block whose values may all be zero may have the least scale, though neither of its ends has it."""
    high, zeros = torch.full((1, 128), 2.0), torch.zeros(1, 128)
    scale = torch.tensor(0.25) if format == "nvfp4" else None
    made = codec.quantize(zeros, format, global_scale=scale)
    assert made.scale is not None
    parts = {"data": made.data, "scale": made.scale}
    assert error(parts, Quantized(get_format(format), -high, high, scale)) == 0
    assert error(parts, Quantized(get_format(format), high / 2, high, scale)) == 1


def test_wrong_buffers_are_refused() -> None:
    expected = Quantized(
        get_format("fp8_row"), torch.ones(2, 32), torch.ones(2, 32), None, {"residual": torch.ones(2, 32)}
    )
    made = codec.quantize(torch.ones(2, 32), "fp8_row")
    assert made.scale is not None
    parts = {"data": made.data, "scale": made.scale, "residual": torch.ones(2, 32)}
    assert error(parts, expected) == 0
    for name, part in (("data", made.data[:1]), ("scale", made.scale[:1]), ("residual", torch.ones(2, 32).double())):
        with pytest.raises(ValueError, match=rf"^{name}: expected .*; got "):
            error(parts | {name: part}, expected)
    nothing = Quantized(get_format("fp8_row"), torch.ones(0, 32), torch.ones(0, 32))
    empty = codec.quantize(torch.ones(0, 32), "fp8_row")
    assert empty.scale is not None
    assert error({"data": empty.data, "scale": empty.scale}, nothing) == 0


@pytest.mark.parametrize("kernel", QUANTIZERS, ids=by_name)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (16, 2880)])
def test_work_is_what_the_buffers_hold(kernel: Kernel, rows: int, columns: int) -> None:
    """Inputs once, results once, and nothing that is neither."""
    shape = {"rows": rows, "columns": columns}
    kernel_run, work = kernel.load(), kernel.work(shape)
    weights, activations = (make(shape, 1, "cpu") for make in (kernel_run.make_weights, kernel_run.make_activations))
    held = [*activations.values(), *kernel_run.make_output(shape, "cpu").values()]
    assert work.weight_bytes == sum(part.nbytes for part in weights.values())
    assert work.activation_bytes == sum(part.nbytes for part in held)
    assert work.flops == 0


def test_work_of_some_shapes() -> None:
    """4 rows of 256 values: BF16 in, codes and a scale per tensor, row, 128, 32 or 16 values out."""
    shape = {"rows": 4, "columns": 256}
    work = {name: {k.activation: k.work(shape) for k in find_kernels(name)} for name in
            ("quantize", "rms_norm_quantize", "swiglu_quantize")}  # fmt: skip
    written = {"fp8": 1024 + 4, "fp8_row": 1024 + 16, "fp8_group": 1024 + 32, "mxfp8": 1024 + 32,
               "mxfp4": 512 + 32, "nvfp4": 512 + 64}  # fmt: skip
    for format, result in written.items():
        scale = 4 if format == "nvfp4" else 0
        assert work["quantize"][format] == Work(scale, 2048 + result, 0.0)
        assert work["rms_norm_quantize"][format] == Work(512 + scale, 3 * 2048 + result, 0.0)
        assert work["swiglu_quantize"][format] == Work(scale, 2 * 2048 + result, 0.0)


@pytest.mark.parametrize("kernel", QUANTIZERS, ids=by_name)
def test_the_tile_is_that_of_the_points(kernel: Kernel) -> None:
    point = next(p for p in kernel.points() if "/64x7168" in p.name)
    constants = dict(point.constexprs)
    tile = kernel.load().tile({"rows": 64, "columns": 7168}, "cpu")
    assert tile == {
        "block_m": constants.get("BLOCK_M", 1),
        "block_k": constants["BLOCK_K"],
        "num_warps": point.num_warps,
    }


@pytest.mark.parametrize("kernel", QUANTIZERS, ids=by_name)
def test_inputs_follow_the_seed(kernel: Kernel) -> None:
    shape = {"rows": 2, "columns": 64}
    make = kernel.load().make_activations
    first, again, other = make(shape, 1, "cpu"), make(shape, 1, "cpu"), make(shape, 2, "cpu")
    for name, part in first.items():
        assert torch.equal(part, again[name])
        assert not torch.equal(part, other[name])
    assert len({part.data_ptr() for part in first.values()}) == len(first)
