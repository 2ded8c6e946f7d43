"""The schedule of routed rows: against the reference, its properties for any load, poison, bad input."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenfab.kernels import moe_schedule
from tokenfab.kernels.loads import balanced, power_law
from tokenfab.kernels.moe_schedule import Schedule, empty_schedule, max_blocks, schedule
from tokenfab.kernels.routing_reference import schedule_ref

GARBAGE = 2**30 + 5
GUARD = 16
FIELDS = ("expert_offsets", "row_index", "position", "block_expert", "block_start")


@pytest.fixture(params=["one launch", "three launches"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of any size, but for no rows at all."""
    monkeypatch.setattr(moe_schedule, "ONE_LAUNCH_ROWS", 0 if request.param == "three launches" else 2**20)
    return request.param


def guarded(empty: Schedule) -> tuple[Schedule, dict[str, torch.Tensor]]:
    """The same with garbage in and around every tensor, and the wider tensors."""
    tensors = {f.name: getattr(empty, f.name) for f in dataclasses.fields(empty) if f.name != "block_m"}
    wide = {name: torch.full((t.numel() + 2 * GUARD,), GARBAGE, dtype=torch.int32, device=t.device)
            for name, t in tensors.items()}  # fmt: skip
    inner = {name: tensor[GUARD : tensor.numel() - GUARD] for name, tensor in wide.items()}
    return Schedule(**inner, block_m=empty.block_m), wide


def check(ids: torch.Tensor, experts: int, block_m: int, device: torch.device, first: int = 0) -> Schedule:
    """Equal to the reference in every element, written from garbage, nothing beside."""
    out, wide = guarded(empty_schedule(*ids.shape, experts, block_m, device))
    got = schedule(ids.to(device), experts, block_m, first_expert=first, out=out)
    assert got is out
    for name, expected in schedule_ref(ids, experts, block_m, first).items():
        found = getattr(got, name).tolist()
        assert found == expected + [-1] * (len(found) - len(expected)), name
    for name, tensor in wide.items():
        assert (tensor[:GUARD] == GARBAGE).all(), name
        assert (tensor[tensor.numel() - GUARD :] == GARBAGE).all(), name
    return got


def check_properties(found: Schedule, ids: torch.Tensor, first: int) -> None:
    """What a grouped matmul relies on, without the reference."""
    flat, block_m = ids.flatten().long(), found.block_m
    offsets, row_index, position, block_expert, block_start = (getattr(found, name).long().cpu() for name in FIELDS)
    is_local = (flat >= first) & (flat < first + found.num_local_experts)
    total = int(is_local.sum())
    assert offsets[0] == 0
    assert offsets[-1] == total
    rows = row_index[:total]
    assert sorted(rows.tolist()) == is_local.nonzero().flatten().tolist()  # a permutation of the local rows
    assert (row_index[total:] == -1).all()
    assert torch.equal(position[rows], torch.arange(total))
    assert (position[~is_local] == -1).all()
    for expert, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        assert (flat[rows[start:end]] == first + expert).all()
        assert (rows[start:end].diff() > 0).all()  # stable
    covered: list[int] = []
    used = int((block_expert >= 0).sum())
    assert (block_expert[used:] == -1).all()
    assert (block_start[used:] == -1).all()
    for expert, start in zip(block_expert[:used].tolist(), block_start[:used].tolist(), strict=True):
        assert offsets[expert] <= start < offsets[expert + 1]
        covered += range(start, min(start + block_m, int(offsets[expert + 1])))
    assert covered == list(range(total))  # every row once, none across experts


SHAPES = [
    (1, 1, 1, 1),
    (1, 8, 256, 16),
    (5, 3, 7, 4),
    (16, 8, 128, 16),
    (129, 1, 3, 64),
    (33, 16, 33, 1),
    (64, 10, 512, 16),
]


@pytest.mark.parametrize(("tokens", "top_k", "experts", "block_m"), SHAPES)
def test_random_ids(path: str, tokens: int, top_k: int, experts: int, block_m: int, device: torch.device) -> None:
    """Padding and numbers out of range among them."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-2, experts + 2, (tokens, top_k), dtype=torch.int32, generator=generator)
    check_properties(check(ids, experts, block_m, device), ids, 0)


@pytest.mark.parametrize("name", ["one expert", "last expert", "one row each", "a third empty", "none local", "twice"])
@pytest.mark.parametrize("block_m", [1, 16, 100])
def test_r05_loads_at_the_edge(path: str, name: str, block_m: int, device: torch.device) -> None:
    experts = 40
    ids = {
        "one expert": torch.full((75, 2), 3),
        "last expert": torch.full((65, 2), experts - 1),
        "one row each": torch.arange(experts).flip(0).view(-1, 2),
        "a third empty": torch.arange(150).view(-1, 2) * 3 % experts // 3 * 3,
        "none local": torch.tensor([[-1, experts, 2**31 - 1, -(2**31)]] * 5),
        "twice": torch.arange(70).view(-1, 1).repeat(1, 2) % experts,
    }[name].int()
    check_properties(check(ids, experts, block_m, device), ids, 0)


def test_no_tokens(device: torch.device) -> None:
    found = check(torch.empty(0, 8, dtype=torch.int32), 5, 16, device)
    assert found.expert_offsets.tolist() == [0] * 6
    assert found.block_expert.numel() == 0


@given(st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_r05_any_load(path: str, device: torch.device, data: st.DataObject) -> None:
    tokens, top_k = data.draw(st.integers(0 if path == "one launch" else 1, 50)), data.draw(st.integers(1, 8))
    experts, block_m = data.draw(st.integers(1, 70)), data.draw(st.sampled_from([1, 2, 3, 16, 64]))
    first = data.draw(st.integers(0, 5))
    hot = data.draw(st.integers(0, experts + 5))
    seed, share = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from([0.0, 0.5, 0.95]))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts + 6, (tokens, top_k), dtype=torch.int32, generator=generator)
    ids[torch.rand(tokens, top_k, generator=generator) < share] = hot
    check_properties(check(ids, experts, block_m, device, first), ids, first)


@pytest.mark.parametrize("top_k", [8, 6])
def test_where_one_launch_ends(top_k: int, device: torch.device) -> None:
    """The largest of one launch, and the first of three: nothing patched."""
    tokens = moe_schedule.ONE_LAUNCH_ROWS // top_k
    for count in (tokens, tokens + 1):
        ids = power_law(count, 160, top_k, 1.2, seed=count)
        found = check(ids, 160, 16, device)
        assert (found.workspace.numel() > 0) == (count > tokens)


def test_sums_over_many_chunks(path: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Prefill: several tiles of chunks and, in one launch, of counts. On a CPU smaller tiles stand for more rows."""
    tokens = 16384
    if device.type == "cpu":
        tokens = 131
        monkeypatch.setattr(moe_schedule, "CHUNK_TILE", 4)
    ids = power_law(tokens, 48, 8, 1.01, seed=1)
    ids[::7] = -1
    check(ids, 48, 64, device)


@pytest.mark.parametrize("sizes", [(16, 16, 16, 16), (1, 40, 0, 23), (64,)])
def test_slices_of_all_ranks_share_the_rows_out(path: str, sizes: tuple[int, ...], device: torch.device) -> None:
    ids = power_law(40, 64, 6, 1.2, seed=3)
    ids[5] = -1
    taken: list[int] = []
    first = 0
    for experts in filter(None, sizes):
        found = check(ids, experts, 16, device, first)
        check_properties(found, ids, first)
        rows = found.row_index[found.row_index >= 0].tolist()
        assert (found.position.cpu() >= 0).sum() == len(rows)
        taken += rows
        first += experts
    assert sorted(taken) == (ids.flatten() >= 0).nonzero().flatten().tolist()


@pytest.fixture
def reordered(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of the interpreter in reverse."""
    if device.type != "cpu":
        pytest.skip("a GPU orders programs itself")
    from triton.runtime.interpreter import interpreter_builder

    ordered: Any = interpreter_builder.set_grid_idx

    def reversed_grid(x: int, y: int, z: int) -> None:
        ordered(interpreter_builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", reversed_grid)


@pytest.mark.usefixtures("reordered")
def test_r15_the_order_of_programs_does_not_show(path: str, device: torch.device) -> None:
    ids = torch.randint(-1, 24, (100, 5), dtype=torch.int32, generator=torch.Generator().manual_seed(8))
    check(ids, 20, 4, device, 2)


def most_blocks(rows: int, experts: int, block_m: int) -> int:
    """Over every load of up to ``rows`` rows: the largest sum of ceil(count / block_m)."""
    best = [0] * (rows + 1)  # with so many rows and the experts so far
    for _ in range(experts):
        best = [max(best[n - c] + -(-c // block_m) for c in range(n + 1)) for n in range(rows + 1)]
    return best[rows]


def test_the_bound_of_blocks_is_tight() -> None:
    for rows, experts, block_m in itertools.product(range(20), range(1, 8), range(1, 7)):
        assert max_blocks(rows, experts, block_m) == most_blocks(rows, experts, block_m), (rows, experts, block_m)
    assert max_blocks(16384 * 8, 256, 64) == 256 + (131072 - 256) // 64


@pytest.mark.parametrize(("tokens", "experts", "block_m"), [(96, 20, 16), (3, 64, 16), (50, 7, 1)])
def test_the_worst_load_fills_every_block(
    path: str, tokens: int, experts: int, block_m: int, device: torch.device
) -> None:
    """A row for each expert, the rest for the first one: block_m at a time."""
    ids = torch.zeros(tokens * 4, dtype=torch.int32)
    busy = min(experts, tokens * 4)
    ids[:busy] = torch.arange(busy, dtype=torch.int32)
    found = check(ids.view(tokens, 4), experts, block_m, device)
    assert (found.block_expert >= 0).all()


@pytest.mark.parametrize("ids", [balanced(64, 128, 4), power_law(64, 128, 4, 1.01, num_ranks=4, seed=2)])
def test_the_published_loads(path: str, ids: torch.Tensor, device: torch.device) -> None:
    check_properties(check(ids, 32, 16, device), ids, 0)


def test_a_schedule_is_filled_again(path: str, device: torch.device) -> None:
    """As a captured graph replays: nothing is left of the load before."""
    out = empty_schedule(30, 4, 16, 8, device)
    for seed in range(3):
        ids = power_law(30, 16, 4, 1.2, seed=seed)
        schedule(ids.to(device), 16, 8, out=out)
        check_properties(out, ids, 0)


def test_bad_arguments_are_refused(device: torch.device) -> None:
    ids = torch.zeros(6, 4, dtype=torch.int32, device=device)
    out = empty_schedule(6, 4, 8, 16, device)
    wide = torch.zeros(6, 8, dtype=torch.int32, device=device)
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("ids: expected int32 (T, k); got torch.int64 (6, 4)", (ids.long(), 8, 16), {}),
        ("ids: expected int32 (T, k); got torch.int32 (24,)", (ids.flatten(), 8, 16), {}),
        ("ids: expected contiguous; got stride (8, 1)", (wide[:, :4], 8, 16), {}),
        ("num_local_experts: expected 1 to 1024; got 0", (ids, 0, 16), {}),
        ("num_local_experts: expected 1 to 1024; got 1025", (ids, 1025, 16), {}),
        ("block_m: expected 1 to 65536; got 0", (ids, 8, 0), {}),
        ("first_expert: expected 0 or more; got -1", (ids, 8, 16), {"first_expert": -1}),
        ("out: expected block_m = 32; got 16", (ids, 8, 32), {"out": out}),
        ("out.expert_offsets: expected int32 (10,), contiguous; got torch.int32 (9,)", (ids, 9, 16), {"out": out}),
        ("out.row_index: expected int32 (20,), contiguous; got torch.int32 (24,)", (ids[:5], 8, 16), {"out": out}),
        ("top_k: expected 1 or more; got 0", (ids[:, :0].contiguous(), 8, 16), {}),
    ]
    for message, arguments, options in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            schedule(*arguments, **options)
    with pytest.raises(ValueError, match="num_tokens: expected at most 1073741824 rows of 8 a token; got 134217729"):
        empty_schedule(2**27 + 1, 8, 256, 16, "meta")
    with pytest.raises(ValueError, match="num_tokens: expected 0 or more; got -1"):
        empty_schedule(-1, 8, 256, 16, "meta")
