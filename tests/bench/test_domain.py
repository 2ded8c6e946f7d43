"""A GPU in another scale-up domain: rows within both domains stand, links between domains are a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenfab.bench.deployment import Deployment, get_precision
from tokenfab.bench.domain import anchor, native, span, with_domain
from tokenfab.bench.gpus import GPUS, get_gpu
from tokenfab.bench.models import load_model
from tokenfab.bench.ops import Collective, ExpertAllToAll, Gemm
from tokenfab.bench.published import MEASURED, MODELLED, PublishedData
from tokenfab.bench.step_table import StepTable
from tokenfab.bench.step_time import published_step

GB200, H200 = get_gpu("gb200"), get_gpu("h200")


def dispatch(ep: int) -> ExpertAllToAll:
    return ExpertAllToAll("dispatch", 64, 7168, 8, 256, ep, "bf16")


SENT = 64 * 8 * 7168 * 2
"""Bytes that ``dispatch`` sends, one BF16 copy per expert."""


def test_only_the_domain_changes_and_its_name_says_so() -> None:
    cut = with_domain(GB200, 8)
    assert (cut.name, cut.scale_up_gpus) == ("gb200@8", 8)
    assert replace(cut, name=GB200.name, title=GB200.title, aliases=GB200.aliases, scale_up_gpus=72) == GB200
    assert with_domain(GB200, 72) is GB200
    assert with_domain(cut, 72) is GB200
    assert native(cut) is GB200
    assert all(native(gpu) is gpu for gpu in GPUS.values())


@pytest.mark.parametrize("size", [0, -8, 1025, 2.5])
def test_a_domain_is_a_number_of_gpus(size: float) -> None:
    with pytest.raises(ValueError, match="domain: expected a whole number of GPUs from 1 to 1024"):
        with_domain(GB200, size)  # type: ignore[arg-type]


def test_within_both_domains_the_row_stands(published: PublishedData) -> None:
    cut = with_domain(GB200, 8)
    stack = published.stack(GB200, "trtllm")
    for op in (dispatch(8), Collective("all_reduce", 4096 * 7168, 4), Gemm(64, 7168, 2048)):
        assert anchor(op, cut) is None
        assert published.time(op, cut, stack) == published.time(op, GB200, stack)
    assert published.time(dispatch(8), cut, stack).provenance == MEASURED


def test_beyond_a_cut_domain_a_measured_row_is_not_passed_off(published: PublishedData) -> None:
    """TensorRT-LLM measured 32 GPUs of an NVL72. Cut to 8, 24 of 32 parts leave at 100 GB/s: 55.05 us against 7.90."""
    cut, stack = with_domain(GB200, 8), published.stack(GB200, "trtllm")
    own, other = published.time(dispatch(32), GB200, stack), published.time(dispatch(32), cut, stack)
    assert (own.provenance, other.provenance) == (MEASURED, MODELLED)
    rise_s = SENT * 24 / 32 / 100e9 - SENT * 31 / 32 / 900e9
    assert rise_s * 1e6 == pytest.approx(55.05 - 7.90, abs=0.01)
    assert other.time_s - own.time_s == pytest.approx(rise_s / 0.8, rel=1e-9)
    assert other.source == f"{own.source}, and the rise of the floor in a domain of 8 / 0.8"


def test_a_widened_domain_starts_from_its_own_rows(published: PublishedData) -> None:
    """Rows of two nodes over InfiniBand say nothing of 16 GPUs over NVLink: the row of 8 does, with more bytes."""
    wide, stack = with_domain(H200, 72), published.stack(H200, "sglang")
    assert anchor(dispatch(16), wide) == (dispatch(8), H200)
    base, other = published.time(dispatch(8), H200, stack), published.time(dispatch(16), wide, stack)
    assert other.provenance == MODELLED
    rise_s = SENT * (15 / 16 - 7 / 8) / 450e9
    assert other.time_s - base.time_s == pytest.approx(rise_s / 0.8, rel=1e-9)
    assert other.time_s < published.time(dispatch(16), H200, stack).time_s
    reduce = Collective("all_reduce", 4096 * 7168, 32)
    assert anchor(reduce, wide) == (replace(reduce, num_gpus=8), H200)
    assert span(reduce) == 32


def test_a_copy_of_the_same_name_has_times_of_its_own(published: PublishedData) -> None:
    """``dataclasses.replace`` keeps the name: no answer of the one is given for the other."""
    stack = published.stack(GB200, "trtllm")
    own = published.time(dispatch(32), GB200, stack)
    copy = replace(GB200, scale_up_gpus=8)
    assert published.time(dispatch(32), copy, stack) == published.time(dispatch(32), with_domain(GB200, 8), stack)
    assert published.time(dispatch(32), GB200, stack) == own
    assert published.time(dispatch(32), copy, stack).time_s > own.time_s


@pytest.mark.parametrize("gpu", [with_domain(GB200, 8), with_domain(H200, 72), with_domain(H200, 4)])
def test_many_steps_equal_each_alone_in_any_domain(published: PublishedData, gpu: object) -> None:
    model, precision = load_model("deepseek-v3"), get_precision("fp8")
    ones = [
        Deployment(32, 1, 32, precision, 1, 4096),
        Deployment(16, 2, 16, precision, 0.5, 4096),
        Deployment(16, 1, 16, precision, 1, 4096, exchange="all_gather"),
        Deployment(16, 16, 16, precision, 1 / 16, 4096),
    ]
    table = StepTable(model, ones, [[1, 40]] * 4)
    for stack in (published.stack(gpu, name) for name in ("vllm", "sglang", "trtllm")):  # type: ignore[arg-type]
        totals = table.totals(published, gpu, stack)  # type: ignore[arg-type]
        for place in range(8):
            one, sequences = ones[place // 2], (1, 40)[place % 2]
            deployment = replace(one, batch_per_gpu=sequences / one.attention_tp)
            alone = published_step(published, model, gpu, stack, deployment, check_memory=False)  # type: ignore[arg-type]
            assert totals.step_s[place] == pytest.approx(alone.step_s, rel=1e-12)
            assert totals.shares[:, place] == pytest.approx(list(alone.coverage().values()), abs=1e-12)


def test_the_all_to_all_bound_of_both_fabrics() -> None:
    """arXiv 2505.09343: 32 tokens, 9 experts of 7000, FP8 out and BF16 back, 61 layers of two micro-batches.

    120.96 us over 50 GB/s are at most 67 tokens/s/user; the 900 GB/s of an NVL72 make it 6.72 us and about 1,200.
    """
    infiniband = replace(with_domain(GB200, 1), scale_out_bytes_per_s=50e9)
    for gpu, us, least, most in ((infiniband, 120.96, 67, 68), (GB200, 6.72, 1200, 1230)):
        ops = [ExpertAllToAll(phase, 32, 7000, 9, 256, 72, payload)
               for phase, payload in (("dispatch", "fp8"), ("combine", "bf16"))]  # fmt: skip
        leaving_s = sum(op.floor_s(gpu) for op in ops) * 72 / 71  # a rank keeps 1 of 72 parts
        assert leaving_s * 1e6 == pytest.approx(us, rel=1e-12)
        assert least < 1 / (61 * 2 * leaving_s) < most
