"""Tokens kept per step: from rates and from measured lengths, and what is refused."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenfab.costing.levers.acceptance import MEASURED, Acceptance, get_acceptance


@pytest.mark.parametrize(
    ("rates", "drafts", "kept"),
    [
        ([0.85], 1, 1.85),
        ([0.5], 3, 1.875),  # 1 + 1/2 + 1/4 + 1/8
        ([0.9, 0.5, 0.0], 3, 2.35),  # 1 + 0.9 + 0.45 + 0
        ([0.0], 4, 1.0),
        ([1.0], 7, 8.0),
    ],
)
def test_kept_tokens(rates: list[float], drafts: int, kept: float) -> None:
    assert Acceptance.of_rates(rates).kept_tokens(drafts) == pytest.approx(kept, rel=1e-12)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_kept_tokens_equal_the_mean_over_all_outcomes(rates: list[float]) -> None:
    """Every pattern of accepted and refused drafts, weighted: kept are those before the first refusal, and one."""
    mean = 0.0
    for pattern in itertools.product((True, False), repeat=len(rates)):
        weight = 1.0
        for accepted, rate in zip(pattern, rates, strict=True):
            weight *= rate if accepted else 1 - rate
        mean += weight * (1 + len(list(itertools.takewhile(bool, pattern))))
    assert Acceptance.of_rates(rates).kept_tokens(len(rates)) == pytest.approx(mean, rel=1e-9)


def test_measured_rows_are_the_sources() -> None:
    golden = {
        "qwen3.5-397b-mtp": (1.93, 3.39, 5.04), "glm-5.2": (1.84, 2.99, 3.91), "deepseek-v4-pro": (1.79, 2.49, 2.54),
    }  # fmt: skip
    for name, lengths in golden.items():
        assert tuple(get_acceptance(name).kept_tokens(drafts) for drafts in (1, 3, 7)) == lengths
    assert get_acceptance("deepseek-v3-mtp-low").kept_tokens(1) == 1.85
    assert get_acceptance("DeepSeek-V3-MTP-high").kept_tokens(1) == pytest.approx(1.9)
    assert all(row.source for row in MEASURED.values())
    assert "InferenceX" in get_acceptance("glm-5.2").describe()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Acceptance.of_rates([1.2]), "acceptance_rate: expected a share between 0 and 1; got 1.2"),
        (lambda: Acceptance.of_rates([0.5, -0.1]), "acceptance_rate: expected a share between 0 and 1; got -0.1"),
        (lambda: Acceptance.of_rates([float("nan")]), "acceptance_rate: expected a share between 0 and 1; got nan"),
        (lambda: Acceptance.of_rates([]), "acceptance: expected rates or lengths; got neither"),
        (lambda: Acceptance.of_lengths([1], [0.9]), "acceptance_length: expected 1 to 2 tokens with 1 draft; got 0.9"),
        (lambda: Acceptance.of_lengths([3], [4.1]), "acceptance_length: expected 1 to 4 tokens with 3 drafts; got 4.1"),
        (lambda: Acceptance.of_lengths([1, 3], [1.5]), "expected one per number of drafts (1, 3); got 1.5"),
        (lambda: Acceptance.of_lengths([], []), "acceptance_length: expected one per number of drafts"),
        (lambda: Acceptance.of_lengths([1, 1], [1.5, 1.6]), "drafts: expected different numbers; got 1, 1"),
        (lambda: Acceptance.of_rates([0.5]).kept_tokens(0), "drafts: expected a whole number from 1 to 64; got 0"),
        (lambda: Acceptance.of_rates([0.5, 0.4]).kept_tokens(3), "drafts: expected at most 2"),
        (lambda: get_acceptance("glm-5.2").kept_tokens(2), "drafts: expected one with a known acceptance (1, 3, 7;"),
        (lambda: get_acceptance("deepseek-v3-mtp-low").kept_tokens(2), "drafts: expected at most 1"),
        (lambda: get_acceptance("glm"), "acceptance: expected one of deepseek-v3-mtp-low"),
    ],
)
def test_r28_absurd_acceptances_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()  # type: ignore[operator]
