"""Tuned tiles: found at their own shape and nowhere else, and really launched, with right results."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from recorder import Recorder
from tokenfab.bench.tune_space import SPACES, TUNED_OPS, place_of
from tokenfab.kernels import fp8_matmul
from tokenfab.kernels.reference import error
from tokenfab.kernels.registry import KERNELS, Kernel, find_kernels
from tokenfab.kernels.split_k import arch_of
from tokenfab.kernels.tiles import Tile, find_tile
from tokenfab.kernels.tuned import TunedTile, sizes_of, use_tuned

SIZES = {"tokens": 64, "n": 2112, "k": 7168}
OTHER = Tile(64, 256, 128, 8, 4)
ROW = TunedTile("fp8", "block", "sm_90", sizes_of(SIZES), OTHER)
DEFAULT = find_tile("fp8", "block", "sm_90", 64)

SHAPES = {
    "gemm": {"m": 20, "n": 192, "k": 256},
    "moe": {"num_tokens": 6, "hidden": 256, "inter": 128, "top_k": 2, "num_experts": 4, "ep": 2, "load": 0},
    "attention": {"batch": 2, "length": 40, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "window": 0, "q_len": 1,
                  "page_size": 16},
    "mla": {"batch": 2, "length": 40, "num_heads": 16, "kv_lora_rank": 512, "rope_dim": 64, "q_len": 1,
            "page_size": 16},
}  # fmt: skip


def found(kernel: str = "fp8", format: str = "block", arch: str = "sm_90", tokens: int = 64, **sizes: int) -> Tile:
    return find_tile(kernel, format, arch, tokens, **({"n": 2112, "k": 7168} | sizes))


def test_a_tuned_tile_is_used_at_its_own_place_only() -> None:
    assert found() == DEFAULT != OTHER
    with use_tuned([ROW]):
        assert found() == OTHER
        assert found(k=7168, n=2112) == OTHER
        assert found(n=2113) == DEFAULT
        assert found(k=7296) == DEFAULT
        assert found(tokens=63) == DEFAULT
        assert found(batch=1) == DEFAULT
        assert found(arch="sm_100") == find_tile("fp8", "block", "sm_100", 64)
        assert found(format="row") == find_tile("fp8", "row", "sm_90", 64)
        assert find_tile("fp8", "block", "sm_90", 64) == DEFAULT  # asked without its sizes
    assert found() == DEFAULT


def test_blocks_nest_and_end_with_an_error() -> None:
    with use_tuned([ROW]):
        with use_tuned(()):
            assert found() == DEFAULT
        assert found() == OTHER
        with pytest.raises(KeyError), use_tuned([replace(ROW, tile=DEFAULT)]):
            raise KeyError
        assert found() == OTHER
    with pytest.raises(ValueError, match=r"rows: expected one tile per place; got two for fp8 block"):
        use_tuned([ROW, replace(ROW, tile=DEFAULT)]).__enter__()
    assert found() == DEFAULT


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.op in TUNED_OPS], ids=lambda kernel: kernel.name)
def test_every_kernel_asks_for_the_place_that_tuning_gives_it(kernel: Kernel, device: torch.device) -> None:
    if device.type == "cuda" and kernel.min_capability > 10 * torch.cuda.get_device_capability(device)[0]:
        pytest.skip("not on this GPU")
    shape = SHAPES[kernel.op]
    place = place_of(kernel, shape, arch_of(device))
    run = kernel.load()
    assert run.tile(shape, device) == asdict(place.default)
    other = replace(place.default, num_stages=place.default.num_stages + 1)
    with use_tuned([place.tuned(other)]):
        assert run.tile(shape, device) == asdict(other)
    for name, size in place.sizes:
        moved = sizes_of(dict(place.sizes) | {name: size + 1})
        with use_tuned([replace(place.tuned(other), sizes=moved)]):
            assert run.tile(shape, device) == asdict(place.default), name


def test_the_launch_takes_the_tile(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    (kernel,) = find_kernels("gemm", ["fp8_block"])
    recorder = Recorder(fp8_matmul._fp8_few_tokens_kernel)
    monkeypatch.setattr(fp8_matmul, "_fp8_few_tokens_kernel", recorder)
    shape, run = SHAPES["gemm"], kernel.load()
    with use_tuned([place_of(kernel, shape, arch_of(device)).tuned(Tile(16, 64, 128, 4, 5))]):
        buffers = run.make_weights(shape, 0, device), run.make_activations(shape, 0, device)
        run.launch(*buffers, run.make_output(shape, device))
    assert recorder.arguments["BLOCK_N"] == 64
    assert recorder.arguments["BLOCK_M"] == 16
    assert recorder.options == {"num_warps": 4, "num_stages": 5}


CASES = [
    ("gemm", "fp8_block", {"block_m": 16, "block_n": 64}),
    ("gemm", "mxfp4-bf16", {"block_m": 16, "block_n": 128, "block_k": 128}),
    ("moe", "fp8_block", {"block_m": 32, "block_n": 256, "num_warps": 8}),
    ("moe", "fp8_block", {"block_m": 16, "block_n": 128}),
    ("moe", "mxfp4-bf16", {"block_m": 64, "block_n": 128, "block_k": 128}),
    ("attention", "fp8", {"block_m": 16, "block_n": 32}),
    ("mla", "bf16", {"block_m": 16, "block_n": 32}),
]


@pytest.mark.parametrize(("op", "format", "changes"), CASES)
def test_r18_results_are_right_under_another_tile(
    op: str, format: str, changes: dict[str, int], device: torch.device
) -> None:
    kernel = find_kernels(op, [format])[0]
    shape, run = SHAPES[op], kernel.load()
    place = place_of(kernel, shape, arch_of(device))
    tile = replace(place.default, **changes)
    assert tile != place.default
    assert tile in set(SPACES[place.kernel].tiles())
    with use_tuned([place.tuned(tile)]):
        weights, activations = run.make_weights(shape, 0, device), run.make_activations(shape, 0, device)
        output = run.make_output(shape, device).fill_(float("nan"))
        run.launch(weights, activations, output)
    assert error(output, run.reference(shape, weights, activations)) <= kernel.tolerance


def test_a_layers_workspace_keeps_the_tiles_it_was_made_with(device: torch.device) -> None:
    """Blocks are planned once: a launch under other tiles must not take them for its own."""
    (kernel,) = find_kernels("moe", ["fp8_block"])
    shape, run = SHAPES["moe"], kernel.load()
    place = place_of(kernel, shape, arch_of(device))
    tile = replace(place.default, block_m=32)
    weights, activations = run.make_weights(shape, 0, device), run.make_activations(shape, 0, device)
    output: Any = run.make_output(shape, device)
    with use_tuned([place.tuned(tile)]):
        run.launch(weights, activations, output)
    (workspace,) = run._workspaces.values()
    assert workspace.plan.block_m == 32
    assert workspace.tiles == (tile, tile)
    run.launch(weights, activations, output.fill_(float("nan")))
    assert error(output, run.reference(shape, weights, activations)) <= kernel.tolerance
