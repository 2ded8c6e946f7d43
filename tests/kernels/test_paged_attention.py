"""Paged GQA decoding against float64 over the dequantized cache; what no result may depend on; what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenfab.kernels import attention_plan
from tokenfab.kernels import paged_attention as paged_module
from tokenfab.kernels.attention_plan import plan_attention
from tokenfab.kernels.attention_reference import paged_attention_ref
from tokenfab.kernels.inputs import random_matrix
from tokenfab.kernels.kv_cache import KvCache, empty_kv_cache, read_ref, slots_of, write_ref
from tokenfab.kernels.kv_layout import KV_FORMATS, KvLayout
from tokenfab.kernels.paged_attention import choose_attention_tile, paged_attention
from tokenfab.kernels.reference import error

ROUNDED = ("fp8_row", "nvfp4")
"""Formats whose scale of values up to 2 is no power of two."""

NOWHERE = 1 << 30
"""An entry of a page table that no one may follow."""


@dataclass
class Inputs:
    cache: KvCache
    table: torch.Tensor
    lengths: torch.Tensor
    q: torch.Tensor


def make_inputs(
    format: str, lengths: Sequence[int], device: torch.device, *, heads: int = 4, kv_heads: int = 2, head_dim: int = 64,
    page_size: int = 16, q_len: int = 1, k: torch.Tensor | None = None, v: torch.Tensor | None = None, fill: int = 255,
    spare_pages: int = 1, seed: int = 0,
) -> Inputs:  # fmt: skip
    """Sequences of random (or given, (T, kv_heads, head_dim)) keys and values; other bytes are ``fill``: 255 is NaN."""
    batch, most = len(lengths), max(-(-length // page_size) for length in lengths) + spare_pages
    scale = 2.0**-6 if format == "fp8" else 1.0
    layout = KvLayout(format, head_dim, page_size)
    cache = empty_kv_cache(layout, batch * most, kv_heads, device, k_scale=scale, v_scale=scale / 2 if scale < 1 else 1)
    cache.pages.fill_(fill)
    order = torch.randperm(batch * most, generator=torch.Generator().manual_seed(seed)).view(batch, most)
    table = order.to(torch.int32).to(device)
    for index, length in enumerate(lengths):
        shape = (length, kv_heads, head_dim)
        parts = [random_matrix(length * kv_heads, head_dim, 10 * (seed + index) + half, device).view(shape)
                 for half in (1, 2)]  # fmt: skip
        parts = [part if given is None else given[:length] for part, given in zip(parts, (k, v), strict=True)]
        write_ref(cache, *parts, slots_of(table[index], length, page_size))
        table[index, -(-length // page_size) :] = NOWHERE
    q = random_matrix(batch * q_len * heads, head_dim, seed + 5, device).view(batch * q_len, heads, head_dim)
    return Inputs(cache, table, torch.tensor(lengths, dtype=torch.int32, device=device), q)


def attend(given: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Into outputs and parts full of NaN."""
    out = torch.full_like(given.q, float("nan"), dtype=options.pop("dtype", torch.bfloat16))
    lse = torch.full(given.q.shape[:2], float("nan"), device=given.q.device)
    return paged_attention(given.q, given.cache, given.table, given.lengths, out=out, lse=lse, **options)


def expected(given: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return paged_attention_ref(given.q, given.cache, given.table, given.lengths, **options)


def assert_close(given: Inputs, got: tuple[torch.Tensor, torch.Tensor], **options: Any) -> None:
    """Within the house's tolerance, and twice what a plain BF16 implementation is off."""
    o, lse = expected(given, **options)
    assert error(got[0], o) <= 1
    plain, _ = expected(given, dtype=torch.bfloat16, **options)
    off, plain_off = ((each.double() - o).square().mean().sqrt() for each in (got[0], plain.to(torch.bfloat16)))
    assert off <= 2 * plain_off
    seen = torch.isfinite(lse)
    assert torch.equal(torch.isneginf(got[1]), ~seen)
    assert (got[1].double() - lse)[seen].abs().max() <= 2e-5 * max(1.0, float(lse[seen].abs().max()))


CASES = [
    ("d64", {"heads": 8, "kv_heads": 1}, [0, 1, 15, 16, 17, 300], {}),
    ("d128", {"head_dim": 128, "page_size": 32}, [31, 33, 200], {}),
    ("d256", {"head_dim": 256, "page_size": 128, "heads": 2, "kv_heads": 1}, [128, 150], {}),
    ("verify", {"page_size": 64, "heads": 8, "kv_heads": 1, "q_len": 4}, [4, 64, 131, 2], {"q_len": 4}),
    ("many rows", {"heads": 16, "kv_heads": 1, "q_len": 5}, [90], {"q_len": 5}),
    ("window", {"q_len": 2}, [260, 33, 5], {"q_len": 2, "window": 40}),
    ("capped", {}, [70, 300], {"soft_cap": 3.0, "scale": 0.2}),
    ("five heads each", {"heads": 10, "q_len": 3}, [70], {"q_len": 3}),
    ("one head each", {"heads": 3, "kv_heads": 3}, [70], {}),
    ("prefix", {"q_len": 2}, [100], {"q_len": 2, "is_causal": False}),
    ("pieces", {}, [300, 64, 65, 0], {"split_tokens": 64}),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "lengths", "options"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize("format", KV_FORMATS)
def test_random_inputs(
    format: str, shape: dict[str, int], lengths: list[int], options: dict[str, Any], device: torch.device
) -> None:
    given = make_inputs(format, lengths, device, **shape)  # pyright: ignore[reportArgumentType]
    got = attend(given, **options)
    asked = {name: value for name, value in options.items() if name != "split_tokens"}
    assert_close(given, got, **asked)
    o, _ = expected(given, **asked)
    assert error(got[0].double() * 1.03, o) > 1


@pytest.mark.parametrize("format", ["fp8", "fp8_row"])
def test_terms_apart(format: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where accumulators lie in tensor memory."""
    monkeypatch.setattr(paged_module, "PARTED_ARCHS", ("", "sm_90", "sm_100"))
    given = make_inputs(format, [300, 17], device, head_dim=128)
    assert_close(given, attend(given))


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("format", KV_FORMATS)
def test_each_row_finds_its_token(format: str, page_size: int, device: torch.device) -> None:
    """Keys spell their token's number, so that a query of all of one's weight is on one token: its value, exactly."""
    length, heads, channels = 200, 8, torch.arange(64, device=device)
    bits = (torch.arange(length, device=device)[:, None] >> (channels % 8)[None, :]) & 1
    k = (2.0 - 4.0 * bits).to(torch.bfloat16)
    v = ((torch.arange(length, device=device)[:, None] * 7 + channels[None, :] * 3) % 5 - 2).to(torch.bfloat16)
    v[:, 0] = 2.0  # every block and row has the same largest value
    v[:, ::16] = 2.0
    pairs = [torch.stack((part, part.roll(3, dims=0)), dim=1) for part in (k, v)]  # two heads
    given = make_inputs(format, [length, 77], device, heads=heads, page_size=page_size, k=pairs[0], v=pairs[1])
    tokens = torch.tensor([[3, 199, 64, 127, 0, 16, 133, 78], [0, 1, 76, 15, 63, 64, 31, 32]], device=device)
    group = heads // 2
    for seq in range(2):
        for head in range(heads):
            given.q[seq, head] = pairs[0][tokens[seq, head], head // group] * 4
    o, lse = attend(given, scale=1.0)
    want = torch.stack([torch.stack([pairs[1][tokens[s, h], h // group] for h in range(heads)]) for s in range(2)])
    if format in ROUNDED:
        want = expected(given, scale=1.0)[0]
    assert torch.equal(o, want.float().to(torch.bfloat16))
    assert torch.equal(lse.cpu(), torch.full((2, heads), 64 * 2.0 * 8)) or format in ROUNDED


@pytest.mark.parametrize("format", KV_FORMATS)
def test_r11_a_mean_is_exact(format: str, device: torch.device) -> None:
    """Keys of zero: every token counts alike, and 256 small integers sum exactly, however a sequence is cut."""
    generator = torch.Generator().manual_seed(1)
    v = torch.randint(-2, 3, (256, 1, 64), generator=generator).to(torch.bfloat16).to(device)
    v[:, :, ::16] = 2.0
    given = make_inputs(format, [256], device, heads=4, kv_heads=1, k=torch.zeros_like(v), v=v)
    mean = v.double().mean(dim=0) if format not in ROUNDED else expected(given)[0]
    for split in (None, 64, 128):
        o, lse = attend(given, dtype=torch.float32, split_tokens=split)
        limit = 1e-6 if format in ROUNDED else 0.0
        assert (o.double() - mean).abs().max() <= limit
        assert (lse - math.log(256)).abs().max() <= 1e-6


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("format", ["bf16", "fp8", "nvfp4"])
def test_a_window_has_its_tokens_and_no_others(format: str, window: int, device: torch.device) -> None:
    """Keys of zero, values that tell tokens apart: one token more or less shows in the mean."""
    length, q_len = 150, 3
    v = torch.zeros(length, 1, 64, dtype=torch.bfloat16, device=device)
    v[torch.arange(length), 0, torch.arange(length) % 8] = 2.0
    v[:, :, 8:] = 2.0
    given = make_inputs(format, [length], device, heads=1, kv_heads=1, k=torch.zeros_like(v), v=v, q_len=q_len)
    o, lse = attend(given, dtype=torch.float32, q_len=q_len, window=window)
    _, values = read_ref(given.cache, slots_of(given.table[0], length, 16))
    for token in range(q_len):
        end = length - q_len + 1 + token
        first = max(0, end - window)
        assert (o[token, 0].double() - values[first:end, 0].mean(dim=0)).abs().max() <= 1e-6
        assert abs(float(lse[token, 0]) - math.log(end - first)) <= 1e-6


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5])
def test_r06_query_tokens_before_the_first_key(length: int, device: torch.device) -> None:
    """4 query tokens of a shorter sequence: those before its start see nothing."""
    given = make_inputs("fp8", [length, 40], device, q_len=4)
    o, lse = attend(given, q_len=4)
    unseen = max(0, 4 - length)
    assert torch.equal(o[:unseen], torch.zeros_like(o[:unseen]))
    assert torch.isneginf(lse[:unseen]).all()
    assert_close(given, (o, lse), q_len=4)


def test_sinks_take_their_share(device: torch.device) -> None:
    sinks = torch.tensor([-3.0, 0.0, 2.5, 60.0], device=device)
    given = make_inputs("bf16", [0, 1, 200], device)
    for split in (None, 64):
        o, lse = attend(given, sinks=sinks, split_tokens=split)
        assert_close(given, (o, lse), sinks=sinks)
        assert torch.equal(o[0], torch.zeros_like(o[0]))
        assert torch.allclose(lse[0], sinks)
    both = [attend(given, sinks=sinks.to(dtype))[0] for dtype in (torch.float32, torch.bfloat16)]
    assert torch.equal(*both)


@pytest.mark.parametrize("format", KV_FORMATS)
def test_r03_what_is_not_stored_changes_nothing(format: str, device: torch.device) -> None:
    """Unused pages, page tails and table entries: NaN or zeros, the same bits."""
    options = {"q_len": 2, "window": 90}
    results = []
    for fill in (255, 0, 0x7F):
        given = make_inputs(format, [100, 0, 17, 129], device, q_len=2, fill=fill, page_size=32)
        if fill == 0:
            given.table[given.table == NOWHERE] = 0
        results.append(attend(given, **options))
    for o, lse in results[1:]:
        assert torch.equal(o, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("format", ["bf16", "fp8", "fp8_row", "mxfp4", "nvfp4"])
def test_r09_nan_stays_where_it_is_seen(format: str, device: torch.device) -> None:
    """A NaN in a stored token: in the rows that see it; in a query: in its row."""
    clean = make_inputs(format, [40, 40], device, q_len=2)
    plain = attend(clean, q_len=2, split_tokens=64)
    given = make_inputs(format, [40, 40], device, q_len=2)
    given.q[2, 1, 5], given.q[1, 3, 9] = float("nan"), float("inf")
    o, _ = attend(given, q_len=2, split_tokens=64)
    others = torch.ones(4, 4, dtype=torch.bool)
    for row in ((2, 1), (1, 3)):
        assert o[row].isnan().all()
        others[row] = False
    assert torch.equal(o.cpu()[others], plain[0].cpu()[others])
    value = torch.zeros(1, 2, 64, dtype=torch.bfloat16, device=device)
    value[0, 1, 3] = float("nan")
    last = slots_of(given.table[1], 40, 16)[-1:]
    write_ref(clean.cache, value, torch.zeros_like(value), last)  # the last token's key, of the second KV head
    o, lse = attend(clean, q_len=2, split_tokens=64)
    assert o[3, 2:].isnan().all()
    assert lse[3, 2:].isnan().all()
    assert torch.equal(o[:3], plain[0][:3])
    assert not o[3, :2].isnan().any()


@pytest.mark.parametrize("format", KV_FORMATS)
def test_r16_batch_invariant_mode(format: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits alone and in a batch, and with any number of programs."""
    given = make_inputs(format, [300, 3, 130], device)
    o, lse = attend(given, split_tokens=128)
    for count in (1, 3, 17):
        monkeypatch.setattr(paged_module, "num_plan_programs", lambda *_, count=count: count)
        again = attend(given, split_tokens=128)
        assert torch.equal(again[0], o)
        assert torch.equal(again[1], lse)
    alone = Inputs(given.cache, given.table[2:], given.lengths[2:], given.q[2:])
    single = attend(alone, split_tokens=128)
    assert torch.equal(single[0], o[2:])
    assert torch.equal(single[1], lse[2:])


@pytest.mark.parametrize("format", ["bf16", "fp8", "mxfp4"])
def test_any_cut_is_right_and_repeats(format: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    given = make_inputs(format, [500, 3, 0, 130, 64], device)
    for count in (1, 2, 5, 40):
        monkeypatch.setattr(paged_module, "num_plan_programs", lambda *_, count=count: count)
        got = attend(given)
        assert_close(given, got)
        again = attend(given)
        assert torch.equal(got[0], again[0])
        assert torch.equal(got[1], again[1])


def test_r15_any_order_of_programs(device: torch.device, reverse_programs: Callable[[], None]) -> None:
    given = make_inputs("fp8", [300, 3, 130], device)
    first = attend(given)
    reverse_programs()
    again = attend(given)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_one_long_sequence_beside_short_ones(format: str, device: torch.device) -> None:
    given = make_inputs(format, [100_000, 1, 40, 0, 17], device, heads=8, kv_heads=1, page_size=128)
    assert_close(given, attend(given))


@pytest.mark.parametrize("format", KV_FORMATS)
def test_r04_offsets_beyond_int32(format: str, device: torch.device) -> None:
    """Pages, and query rows, that lie 2^31 bytes and values off. Only the touched memory exists."""
    near = make_inputs(format, [40], device, spare_pages=0)
    record = near.cache.layout.record_bytes
    num_pages = (9 << 30) // (2 * record)  # FP4 is read by words of four bytes: their numbers go beyond 2^31 as well
    pages = torch.empty(num_pages, 2, record, dtype=torch.uint8, device=device)
    places = torch.tensor([num_pages - 1, 3, num_pages // 2], device=device)
    pages[0] = 255
    pages[places] = near.cache.pages[near.table[0].long()]
    cache = KvCache(near.cache.layout, pages, near.cache.factors)
    stride = (1 << 30) + 64
    q = torch.empty(2 * stride + 256, dtype=torch.bfloat16, device=device).as_strided((3, 4, 64), (stride, 64, 1))
    q[2:] = near.q
    q[:2] = near.q
    table, lengths = places.to(torch.int32)[None].repeat(3, 1), near.lengths.repeat(3)
    o, lse = paged_attention(q, cache, table, lengths, split_tokens=64)
    want = attend(near, split_tokens=64)
    assert torch.equal(o[2:], want[0])
    assert torch.equal(lse[2:], want[1])


def test_rows_of_a_wider_matrix_and_float32_out(device: torch.device) -> None:
    given = make_inputs("fp8", [60, 5], device)
    wide = torch.full((2, 2 * 4 * 64), float("nan"), dtype=torch.bfloat16, device=device)
    wide[:, : 4 * 64] = given.q.flatten(1)
    inside = Inputs(given.cache, given.table, given.lengths, wide[:, : 4 * 64].view(2, 4, 64))
    assert torch.equal(attend(inside)[0], attend(given)[0])
    exact, _ = attend(given, dtype=torch.float32)
    assert error(exact, expected(given)[0]) <= 0.6


# -- the plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split_tokens", [None, 64, 192])
@pytest.mark.parametrize(("lengths", "options"), [
    ([0, 0, 0], {}), ([1], {}), ([5000], {}), ([64] * 7, {}), ([0, 63, 64, 65, 0, 900, 1, 0], {}),
    ([700, 40, 3, 300], {"window": 100}), ([700, 40, 3, 300], {"window": 100, "q_len": 4}), ([90] * 130, {}),
])  # fmt: skip
@pytest.mark.parametrize("programs", [1, 5, 33])
def test_a_plan_has_every_tile_once(
    lengths: list[int], options: dict[str, int], programs: int, split_tokens: int | None, device: torch.device
) -> None:
    block, window, q_len = 64, options.get("window"), options.get("q_len", 1)
    plan = plan_attention(
        torch.tensor(lengths, dtype=torch.int32, device=device), programs, block, q_len=q_len, window=window,
        split_tokens=split_tokens, max_length=max(lengths) + 1 if split_tokens else None,
    )  # fmt: skip
    rows = plan.table[: 4 * programs].view(programs, 4).tolist()
    sequences = plan.table[4 * programs : 4 * programs + 5 * len(lengths)].view(-1, 5).tolist()
    seen: dict[tuple[int, int], int] = {}
    parts: dict[int, tuple[int, int]] = {}
    pieces = [0] * len(lengths)
    loads = []
    for program, (first, begin, last, end) in enumerate(rows):
        done = 0
        for seq in range(first, last + 1):
            tiles = sequences[seq][2]
            low, high = begin if seq == first else 0, end if seq == last else tiles
            step = split_tokens // block if split_tokens else max(high - low, 1)
            for start in range(low, high, step):
                stop = min(high, start + step)
                part = sequences[seq][3] + start // step if split_tokens else program + seq
                assert part not in parts
                parts[part] = (seq, start)
                pieces[seq] += 1
                done += stop - start
                for tile in range(start, stop):
                    assert (seq, tile) not in seen
                    seen[seq, tile] = program
        loads.append(done)
    for seq, (length, (stored, skipped, tiles, first_part, count)) in enumerate(zip(lengths, sequences, strict=True)):
        first_key = 0 if window is None else max(0, length - q_len + 1 - window)
        assert (stored, skipped) == (length, first_key // block)
        assert tiles == (-(-length // block) - skipped if length else 0)
        assert all((seq, tile) in seen for tile in range(tiles))
        assert count == pieces[seq]
        assert sorted(part for part, (owner, _) in parts.items() if owner == seq) == list(
            range(first_part, first_part + count)
        )
    assert len(seen) == sum(row[2] for row in sequences)
    assert all(0 <= part < plan.num_parts for part in parts)
    if split_tokens is None:
        cost = sum(row[2] + attention_plan.OVERHEAD_TILES for row in sequences if row[2])
        assert max(loads) <= -(-cost // programs)  # no program has more than its share


def test_a_plan_is_shared_by_layers(device: torch.device) -> None:
    """One plan for two layers; it may be made again in place for new lengths."""
    given, other = (make_inputs("fp8", [300, 20], device, seed=seed) for seed in (0, 9))
    tile = choose_attention_tile(64, "fp8", 2, "sm_90" if device.type == "cuda" else "")
    plan = plan_attention(given.lengths, 7, tile.block_n)
    for each in (given, other):
        assert_close(each, attend(each, plan=plan, tile=tile))
    given.lengths.copy_(torch.tensor([20, 280]))
    given.table[1] = given.table[0]
    plan = plan_attention(given.lengths, 7, tile.block_n, out=plan.table)
    assert_close(given, attend(given, plan=plan, tile=tile))


# -- refusals --------------------------------------------------------------------------------------


def test_what_is_refused(device: torch.device) -> None:
    given = make_inputs("bf16", [40, 3], device)
    plan = plan_attention(given.lengths, 3, 32)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"q": given.q[:1]}, r"q: expected bfloat16 \(2, H, 64\); got torch.bfloat16 \(1, 4, 64\)"),
        ({"q": given.q.float()}, "q: expected bfloat16"),
        ({"q": given.q[:, :3]}, "q: expected a multiple of 2 heads; got 3"),
        ({"q": given.q.transpose(0, 1).contiguous().transpose(0, 1)}, "q: expected heads one behind the other"),
        ({"page_table": given.table.long()}, r"page_table: expected int32 \(2, max_pages\)"),
        ({"lengths": given.lengths[:1]}, r"lengths: expected int32 \(2,\)"),
        ({"lengths": given.lengths.long()}, "lengths: expected contiguous int32"),
        ({"q_len": 2}, r"q: expected bfloat16 \(4, H, 64\)"),
        ({"scale": 0.0}, "scale: expected a positive number; got 0.0"),
        ({"soft_cap": -1.0}, "soft_cap: expected None or a positive number"),
        ({"window": 0}, "window: expected None or at least 1; got 0"),
        ({"window": 5, "is_causal": False}, "window: expected None without causal order; got 5"),
        ({"sinks": torch.zeros(3, device=device)}, r"sinks: expected float32 or bfloat16 \(4,\)"),
        ({"split_tokens": 33}, "split_tokens: expected a multiple of 32; got 33"),
        ({"plan": plan, "q_len": 1, "window": 4}, r"plan: expected \(batch, block_n, q_len, window\)"),
        ({"plan": plan, "split_tokens": 64}, "plan: expected pieces of 64 tokens; got 0"),
        ({"out": torch.empty(2, 4, 32, device=device)}, r"out: expected contiguous bfloat16 or float32 \(2, 4, 64\)"),
        ({"lse": torch.empty(2, 3, device=device)}, r"lse: expected contiguous float32 \(2, 4\)"),
    ]
    for change, message in bad:
        arguments: dict[str, Any] = {
            "q": given.q, "page_table": given.table, "lengths": given.lengths, "tile": choose_attention_tile(
                64, "bf16", 2, "sm_90"), **change,
        }  # fmt: skip
        with pytest.raises(ValueError, match=message):
            paged_attention(arguments.pop("q"), given.cache, arguments.pop("page_table"), arguments.pop("lengths"),
                            **arguments)  # fmt: skip


def test_plans_that_are_refused(device: torch.device) -> None:
    lengths = torch.tensor([3], dtype=torch.int32, device=device)
    for arguments, options, message in (
        ((lengths.long(), 1, 64), {}, "lengths: expected contiguous int32"),
        ((lengths, 0, 64), {}, "num_programs: expected at least 1; got 0"),
        ((lengths, 1, 48), {}, "block_n: expected a power of two, at least 16; got 48"),
        ((lengths, 1, 64), {"q_len": 0}, "q_len: expected at least 1; got 0"),
        ((lengths, 1, 64), {"split_tokens": 64}, "max_length: expected a bound with split_tokens; got None"),
        ((lengths, 1, 64), {"out": lengths}, "out: expected contiguous int32, at least 9 values"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_attention(*arguments, **options)
