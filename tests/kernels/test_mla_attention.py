"""MLA attention over a paged latent cache: values, edges, poison, cuts of a sequence, bad input, how it is compiled."""

from __future__ import annotations

import math
import mmap
import re
from inspect import signature
from typing import Any

import pytest
import torch
from compiled import compiled
from tokenfab.kernels import mla_attention as mla_attention_module
from tokenfab.kernels.attention_plan import plan_attention
from tokenfab.kernels.inputs import random_matrix
from tokenfab.kernels.kv_cache import MlaCache, empty_mla_cache, read_mla_ref, slots_of, write_mla_ref
from tokenfab.kernels.kv_layout import MLA_FORMATS, MlaLayout
from tokenfab.kernels.matmul_points import COMPILED_ARCHS
from tokenfab.kernels.mla_attention import mla_attention
from tokenfab.kernels.mla_points import mla_points, mla_work
from tokenfab.kernels.mla_runs import MlaAttention
from tokenfab.kernels.reference import error
from tokenfab.kernels.tiles import Tile

SCALE = 0.05
FACTOR = 0.25
"""Scale of fp8 caches here."""

SMALL, WGMMA = Tile(16, 32, 256, 4, 2), Tile(64, 64, 128, 8, 2)


def make(
    format: str, lengths: list[int], device: torch.device, *, page: int = 64, heads: int = 16, q_len: int = 1,
    rank: int = 256, rope: int = 32, seed: int = 0, spare: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of ``mla_attention``: shuffled pages, NaN wherever no token is stored, table entries beyond it 2^30."""
    layout = MlaLayout(format, rank, rope, page)
    most = max(-(-length // page) for length in lengths) + spare
    cache = empty_mla_cache(layout, len(lengths) * most + 1, device, scale=FACTOR if format == "fp8" else 1.0)
    cache.pages.fill_(0xFF)
    shuffled = torch.randperm(len(lengths) * most, generator=torch.Generator().manual_seed(seed)) + 1
    table = shuffled.view(len(lengths), most).to(torch.int32).to(device)
    for b, length in enumerate(lengths):
        if length:
            values = random_matrix(length, rank + rope, seed + 7 * b + 1, device)
            write_mla_ref(cache, values[:, :rank], values[:, rank:], slots_of(table[b], length, page))
        table[b, -(-length // page) :] = 2**30
    q = random_matrix(len(lengths) * q_len * heads, rank + rope, seed + 5, device)
    return {
        "q": q.view(len(lengths) * q_len, heads, rank + rope), "cache": cache, "page_table": table,
        "lengths": torch.tensor(lengths, dtype=torch.int32, device=device), "q_len": q_len, "scale": SCALE,
    }  # fmt: skip


def expected(case: dict[str, Any], *, is_causal: bool = True, dtype: torch.dtype = torch.float64) -> Any:
    """(o, lse) sequence by sequence; in BF16 a plain implementation: matmuls in BF16, softmax in float32."""
    q, cache, q_len = case["q"], case["cache"], case["q_len"]
    rank, wide = cache.layout.kv_lora_rank, torch.float64 if dtype == torch.float64 else torch.float32
    o = torch.zeros(*q.shape[:2], rank, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    for b, length in enumerate(case["lengths"].tolist()):
        kv = read_mla_ref(cache, slots_of(case["page_table"][b], length, cache.layout.page_size)).to(dtype)
        for i in range(q_len):
            end = length - q_len + 1 + i if is_causal else length
            if end > 0:
                row = b * q_len + i
                s = (q[row].to(dtype) @ kv[:end].T).to(wide) * case["scale"]
                lse[row] = torch.logsumexp(s, dim=1).double()
                o[row] = (torch.softmax(s, dim=1).to(dtype) @ kv[:end, :rank]).double().cpu()
    return o, lse


def check(case: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q = case["q"]
    shape = (*q.shape[:2], case["cache"].layout.kv_lora_rank)
    out = torch.full(shape, float("nan"), dtype=torch.bfloat16, device=q.device)
    lse = torch.full(shape[:2], float("nan"), device=q.device)
    o, sums = mla_attention(**case, out=out, lse=lse, **options)
    assert o is out
    assert sums is lse
    is_causal = options.get("is_causal", True)
    ref, ref_lse = expected(case, is_causal=is_causal)
    plain, _ = expected(case, is_causal=is_causal, dtype=torch.bfloat16)
    got, got_lse = o.cpu(), lse.cpu().double()
    seen = ref_lse.isfinite()
    assert torch.equal(got_lse.isfinite(), seen)
    assert (got_lse[~seen] == -math.inf).all()
    assert (got[~seen] == 0).all()
    if seen.any():
        assert error(got[seen], ref[seen]) <= 1
        assert float((got.double() - ref).abs().max()) <= 2 * float((plain - ref).abs().max()) + 2.0**-126
        assert float((got_lse - ref_lse)[seen].abs().max()) <= 1e-4 * max(1.0, float(ref_lse[seen].abs().max()))
    return o, lse


@pytest.mark.parametrize("page", [16, 64, 128])
@pytest.mark.parametrize("format", MLA_FORMATS)
def test_r06_lengths_around_pages_and_tiles(format: str, page: int, device: torch.device) -> None:
    check(make(format, [0, 1, page - 1, page, page + 1, 300], device, page=page))


@pytest.mark.parametrize(("heads", "q_len"), [(16, 2), (64, 1), (128, 1), (20, 3), (16, 4)])
@pytest.mark.parametrize("format", MLA_FORMATS)
def test_heads_and_query_tokens(format: str, heads: int, q_len: int, device: torch.device) -> None:
    check(make(format, [1, 70, 131], device, heads=heads, q_len=q_len))


@pytest.mark.parametrize("format", MLA_FORMATS)
def test_the_shape_of_deepseek(format: str, device: torch.device) -> None:
    check(make(format, [65, 190], device, heads=128, rank=512, rope=64))


@pytest.mark.parametrize("tile", [SMALL, WGMMA], ids=str)
@pytest.mark.parametrize("format", MLA_FORMATS)
def test_one_long_sequence_beside_short_ones(format: str, tile: Tile, device: torch.device) -> None:
    check(make(format, [3, 900, 0, 40], device, page=16, heads=32, q_len=2), tile=tile)


@pytest.mark.parametrize("format", MLA_FORMATS)
def test_without_causal_order_every_query_sees_everything(format: str, device: torch.device) -> None:
    o, _ = check(case := make(format, [100, 2], device, q_len=3), is_causal=False)
    assert not torch.equal(o, mla_attention(**case)[0])


@pytest.mark.parametrize("format", MLA_FORMATS)
def test_one_token_is_its_latent(format: str, device: torch.device) -> None:
    """To the last bit, whatever the query."""
    case = make(format, [1, 1], device)
    cache = case["cache"]
    slots = torch.stack([slots_of(row, 1, 64) for row in case["page_table"]]).flatten()
    latent = read_mla_ref(cache, slots)[:, :256].to(torch.bfloat16)
    assert torch.equal(mla_attention(**case)[0], latent[:, None].expand(2, 16, 256))


@pytest.mark.parametrize("format", MLA_FORMATS)
def test_each_query_finds_its_token(format: str, device: torch.device) -> None:
    """Token t is t's own integers; head h asks for token h alone, by its rotated part, and gets them exactly."""
    heads = 20
    case = make(format, [heads], device, page=16, heads=heads)
    cache, generator = case["cache"], torch.Generator().manual_seed(3)
    latent = torch.randint(-8, 9, (heads, 256), generator=generator).to(torch.bfloat16).to(device)
    rope = torch.zeros(heads, 32, dtype=torch.bfloat16, device=device)
    for bit in range(5):  # a code of signs, doubled: the scores of another token are at least 64 less
        signs = 1 - 2 * ((torch.arange(heads, device=device) >> bit) & 1)
        rope[:, bit] = signs * 8
    store = cache.factors[0].to(torch.bfloat16) if format == "fp8" else 1
    write_mla_ref(cache, latent * store, rope * store, slots_of(case["page_table"][0], heads, 16))
    stored = read_mla_ref(cache, slots_of(case["page_table"][0], heads, 16))
    case["q"] = torch.cat((torch.zeros_like(latent), rope), dim=1)[None].contiguous() * 8
    case["scale"] = 4.0
    o, lse = mla_attention(**case)
    assert torch.equal(o[0], stored[:, :256].to(torch.bfloat16))
    top = (case["q"][0].double() * stored).sum(dim=1) * 4
    assert float((lse[0].double() - top).abs().max()) <= 1e-6 * float(top.max())


@pytest.mark.parametrize("format", MLA_FORMATS)
def test_r11_equal_scores_give_the_mean(format: str, device: torch.device) -> None:
    """64 tokens of integers, all scores zero: sums of 64 small integers over 64 are exact."""
    case = make(format, [64], device)
    cache, generator = case["cache"], torch.Generator().manual_seed(4)
    latent = torch.randint(-2, 3, (64, 256), generator=generator).to(torch.bfloat16).to(device)
    latent[:, 0] = 3.5  # the largest of each row, so that fp8_row's scale is a power of two
    slots = slots_of(case["page_table"][0], 64, 64)
    write_mla_ref(cache, latent, torch.zeros(64, 32, dtype=torch.bfloat16, device=device), slots)
    case["q"] = torch.zeros_like(case["q"])
    o, lse = mla_attention(**case)
    mean = read_mla_ref(cache, slots)[:, :256].mean(dim=0)
    assert torch.equal(o, mean.to(torch.bfloat16).expand_as(o))
    assert torch.equal(lse, torch.full_like(lse, math.log(64)))


@pytest.mark.parametrize("format", MLA_FORMATS)
def test_scales_of_any_size(format: str, device: torch.device) -> None:
    """Tokens, and so fp8_row's scales, from 2^-30 to 2^20; queries that fill FP16's range and more."""
    case = make(format, [150], device, page=16)
    sizes = torch.exp2(torch.randint(-30, 21, (150, 1), generator=torch.Generator().manual_seed(1)).float())
    if format != "fp8":
        values = random_matrix(150, 288, 11, device) * sizes.to(torch.bfloat16).to(device)
        slots = slots_of(case["page_table"][0], 150, 16)
        write_mla_ref(case["cache"], values[:, :256], values[:, 256:], slots)
    case["q"] = case["q"] * 2.0**100
    case["scale"] = SCALE * 2.0 ** -(100 if format == "fp8" else 118)
    check(case)


@pytest.mark.parametrize("format", MLA_FORMATS)
def test_r16_batch_invariant(format: str, device: torch.device) -> None:
    """The same bits alone, in a batch, and with any number of programs."""
    case = make(format, [400, 3, 260, 0], device, q_len=2, heads=3)
    whole = check(case, split_tokens=128, tile=WGMMA)
    for programs in (1, 3, 9):
        plan = plan_attention(case["lengths"], programs, 64, q_len=2, split_tokens=128, max_length=448)
        again = mla_attention(**case, plan=plan, tile=WGMMA)
        assert all(torch.equal(a, w) for a, w in zip(again, whole, strict=True))
    for b in (1, 2):
        rows = slice(2 * b, 2 * b + 2)
        one = case | {"q": case["q"][rows], "page_table": case["page_table"][b : b + 1]}
        alone = mla_attention(**one | {"lengths": case["lengths"][b : b + 1]}, split_tokens=128, tile=WGMMA)
        assert all(torch.equal(a, w[rows]) for a, w in zip(alone, whole, strict=True))


@pytest.mark.parametrize("programs", [1, 2, 7, 40])
def test_any_number_of_programs(programs: int, device: torch.device) -> None:
    case = make("bf16", [500, 64, 0, 130], device)
    check(case, plan=plan_attention(case["lengths"], programs, 32), tile=SMALL)


def test_r15_programs_in_any_order(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cuda":
        pytest.skip("the order is the hardware's")
    from triton.runtime import interpreter

    case = make("fp8_row", [500, 64, 0, 130], device)
    o, lse = mla_attention(**case)
    original = interpreter.InterpreterBuilder.set_grid_idx

    def backwards(self: Any, x: int, y: int, z: int) -> None:
        sizes = self.grid_dim
        original(self, sizes[0] - 1 - x, sizes[1] - 1 - y, sizes[2] - 1 - z)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", backwards)
    assert all(torch.equal(a, b) for a, b in zip(mla_attention(**case), (o, lse), strict=True))


@pytest.mark.parametrize("format", MLA_FORMATS)
def test_r09_nan_stays_where_it_is_seen(format: str, device: torch.device) -> None:
    case = make(format, [70, 70], device)
    before, _ = mla_attention(**case)
    case["q"][0, 3, 100] = float("nan")
    o, lse = mla_attention(**case)
    assert o[0, 3].isnan().all()
    assert lse[0, 3].isnan()
    o[0, 3] = before[0, 3]
    assert torch.equal(o, before)
    case = make(format, [70, 70], device)
    page = case["page_table"][1, 1]
    case["cache"].pages[page, 0, :2] = 0xFF  # token 64 of the second sequence
    o, _ = mla_attention(**case)
    assert torch.equal(o[0], before[0])
    assert o[1].isnan().any(dim=1).all()


def test_r04_offsets_beyond_32_bits(device: torch.device) -> None:
    """The last of more than 2^31 bytes' pages; only pages that are touched exist."""
    layout = MlaLayout("fp8", 512, 64, 128)
    num_pages = 2**31 // layout.record_bytes + 3
    if device.type == "cuda":
        pages = torch.empty(num_pages, 1, layout.record_bytes, dtype=torch.uint8, device=device)
    else:
        memory = mmap.mmap(-1, num_pages * layout.record_bytes)
        pages = torch.frombuffer(memory, dtype=torch.uint8).view(num_pages, 1, layout.record_bytes)
    cache = MlaCache(layout, pages, torch.ones(1, device=device))
    table = torch.tensor([[num_pages - 1]], dtype=torch.int32, device=device)
    values = random_matrix(40, 576, 2, device)
    write_mla_ref(cache, values[:, :512], values[:, 512:], slots_of(table[0], 40, 128))
    lengths = torch.tensor([40], dtype=torch.int32, device=device)
    q = random_matrix(16, 576, 1, device)[None]
    check({"q": q, "cache": cache, "page_table": table, "lengths": lengths, "q_len": 1, "scale": SCALE})


def test_a_plan_and_its_parts_serve_several_layers(device: torch.device) -> None:
    from tokenfab.kernels.attention_plan import empty_parts

    case = make("fp8", [400, 20], device)
    plan = plan_attention(case["lengths"], 5, 64)
    parts = empty_parts(plan, 16, 256)
    parts.o.fill_(float("nan"))
    parts.lse.fill_(float("nan"))
    for _ in range(2):
        check(case, plan=plan, parts=parts, tile=WGMMA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 16, 288)}, "q: expected bfloat16 (2, H, 288); got torch.float32"),
        ({"q": torch.zeros(2, 16, 256, dtype=torch.bfloat16)}, "q: expected bfloat16 (2, H, 288)"),
        ({"q": torch.zeros(3, 16, 288, dtype=torch.bfloat16)}, "q: expected bfloat16 (2, H, 288)"),
        ({"q": torch.zeros(2, 288, 16, dtype=torch.bfloat16).mT}, "q: expected contiguous"),
        ({"q_len": 0}, "q_len: expected at least 1; got 0"),
        ({"scale": 0.0}, "scale: expected a positive number; got 0.0"),
        ({"page_table": torch.zeros(2, 3, dtype=torch.int64)}, "page_table: expected int32 (2, max_pages)"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, "lengths: expected int32 (2,)"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "lengths: expected int32 (2,)"),
        ({"split_tokens": 7}, "split_tokens: expected a multiple of"),
        ({"out": torch.zeros(2, 16, 288, dtype=torch.bfloat16)}, "out: expected contiguous bfloat16"),
        ({"lse": torch.zeros(2, 16, dtype=torch.float64)}, "lse: expected contiguous float32 (2, 16)"),
        ({"plan": plan_attention(torch.ones(2, dtype=torch.int32), 1, 16)}, "plan: expected (batch, block_n, q_len"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    case = make("bf16", [1, 2], torch.device("cpu"))
    with pytest.raises(ValueError, match=re.escape(message)):
        mla_attention(**case | changes)


def test_a_scale_is_required(device: torch.device) -> None:
    case = make("bf16", [1], device)
    del case["scale"]
    with pytest.raises(TypeError, match="scale"):
        mla_attention(**case)


RUN = {"batch": 3, "length": 150, "num_heads": 16, "kv_lora_rank": 256, "rope_dim": 32, "q_len": 2, "page_size": 64}


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("format", MLA_FORMATS)
def test_the_run_is_within_tolerance_and_its_work_is_held(format: str, is_exact: bool, device: torch.device) -> None:
    run, work = MlaAttention(format, "bf16"), mla_work(format)(RUN)
    weights = run.make_weights(RUN, 1, device, is_exact=is_exact)
    activations = run.make_activations(RUN, 2, device, is_exact=is_exact)
    ref = run.reference(RUN, weights, activations)
    y = run.make_output(RUN, device)
    for _ in range(2):
        y.fill_(float("nan"))
        run.launch(weights, activations, y)
        assert error(y.cpu(), ref.cpu()) <= 1
    assert error(y.double().cpu() * 1.03, ref.cpu()) > 1
    assert work.weight_bytes == weights["pages"].nbytes * 150 // 192
    assert work.activation_bytes == activations["q"].nbytes + y.nbytes
    assert work.flops == 2 * 3 * 16 * (149 + 150) * (2 * 256 + 32)


def test_points_have_the_kernel_s_arguments() -> None:
    parameters = signature(mla_attention_module._mla_attention_kernel.fn).parameters
    assert len(parameters) <= 25
    for point in mla_points():
        assert set(parameters) == {name for name, _ in point.signature}
    assert len({(point.name, *point.archs) for point in mla_points()}) == len(mla_points())


def test_r18_all_points_compile() -> None:
    """Spills: none but with 64 rows on sm_90, whose 255 registers hold the output and little else."""
    found = compiled(mla_points(), COMPILED_ARCHS)
    assert len(found) == len(mla_points())
    for each in found:
        is_full = dict(each.point.constexprs)["BLOCK_R"] >= 64
        assert each.kinds <= ({"spills"} if is_full else set()), each
        assert each.facts.spill_bytes <= (256 if is_full else 0), each
