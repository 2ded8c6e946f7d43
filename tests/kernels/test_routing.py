"""Routing: every rule against the reference and against plain Python; ties, NaN, poison, bad input."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from tokenfab.kernels.routing import route
from tokenfab.kernels.routing_reference import route_ref
from tokenfab.kernels.routing_rule import Routing

NAN, INF = float("nan"), float("inf")
DEEPSEEK_V3 = Routing(256, 8, "sigmoid", has_bias=True, num_groups=8, kept_groups=4, scaling_factor=2.5)
RULES = {
    "mixtral": Routing(8, 2),
    "gpt-oss": Routing(128, 4),
    "qwen2": Routing(60, 4, renormalize=False),
    "qwen3.5": Routing(512, 10),
    "deepseek-v3": DEEPSEEK_V3,
    "kimi-k2": Routing(384, 8, "sigmoid", has_bias=True, scaling_factor=2.827),
    "llama-4": Routing(16, 1, "sigmoid", renormalize=False),
    "odd groups": Routing(160, 6, "sigmoid", renormalize=False, num_groups=5, kept_groups=3, scaling_factor=0.5),
    "groups of two": Routing(10, 4, "sigmoid", has_bias=True, num_groups=5, kept_groups=2),
    "all kept": Routing(12, 12, "sigmoid", num_groups=3, kept_groups=3),
    "every expert": Routing(7, 7),
    "one expert": Routing(1, 1, "sigmoid"),
    "largest": Routing(1024, 16, renormalize=False, scaling_factor=3.0),
}
RTOL = 2.0**-17


def make(rule: Routing, tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Any]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, rule.num_experts, generator=generator)
    bias = 0.3 * torch.randn(rule.num_experts, generator=generator) if rule.has_bias else None
    return logits.to(dtype), bias


def run(logits: torch.Tensor, rule: Routing, bias: torch.Tensor | None, device: torch.device) -> Any:
    ids, weights = route(logits.to(device), rule, None if bias is None else bias.to(device))
    return ids.cpu(), weights.cpu()


def check(logits: torch.Tensor, rule: Routing, bias: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    ids, weights = run(logits, rule, bias, device)
    expected_ids, expected = route_ref(logits, rule, bias)
    assert ids.dtype == torch.int32
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights.double(), expected, rtol=RTOL, atol=0, equal_nan=True)
    return weights


def by_hand(logits: list[float], rule: Routing, bias: list[float]) -> tuple[list[int], list[float]]:
    """The rule for one token, in Python floats and sorted lists."""
    if rule.scoring == "softmax":
        total = math.fsum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    choice = [score + each for score, each in zip(scores, bias, strict=True)]

    def best(values: dict[int, float], count: int) -> list[int]:
        return sorted(values, key=lambda index: (-values[index], index))[:count]

    size = rule.group_size
    groups = {g: sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(rule.num_groups)}
    kept = best(groups, rule.kept_groups)
    ids = best({e: choice[e] for e in range(rule.num_experts) if e // size in kept}, rule.top_k)
    weights = [scores[e] for e in ids]
    total = sum(weights) if rule.renormalize else 1.0
    return ids, [weight / total * rule.scaling_factor for weight in weights]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_logits_against_the_reference(name: str, dtype: torch.dtype, device: torch.device) -> None:
    rule = RULES[name]
    logits, bias = make(rule, 9, 1, dtype)
    weights = check(logits, rule, bias, device)
    if rule.renormalize:
        torch.testing.assert_close(weights.sum(1), torch.full((9,), rule.scaling_factor), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_the_reference_is_the_rule(name: str) -> None:
    """Float64 tensors against scalars: no code is shared."""
    rule = RULES[name]
    logits, bias = make(rule, 6, 2)
    ids, weights = route_ref(logits, rule, bias)
    flat = bias.tolist() if rule.has_bias else [0.0] * rule.num_experts
    for token in range(6):
        expected_ids, expected = by_hand(logits[token].tolist(), rule, flat)
        assert ids[token].tolist() == expected_ids
        assert weights[token].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "qwen3.5"])
def test_softmax_before_and_after_top_k_are_one_rule(name: str, device: torch.device) -> None:
    rule = RULES[name]
    logits, _ = make(rule, 8, 3)
    ids, weights = run(logits, rule, None, device)
    after, order = torch.topk(logits.double(), rule.top_k)
    before = torch.topk(torch.softmax(logits.double(), dim=1), rule.top_k).values
    assert torch.equal(ids.long(), order)
    torch.testing.assert_close(weights.double(), torch.softmax(after, dim=1), rtol=RTOL, atol=0)
    torch.testing.assert_close(weights.double(), before / before.sum(1, keepdim=True), rtol=RTOL, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_ties_go_to_the_smaller_index(name: str, device: torch.device) -> None:
    """Few distinct logits. Sigmoid: scores of 0, 1/2 and 1 and biases of quarters, so every sum is exact."""
    rule = RULES[name]
    generator = torch.Generator().manual_seed(4)
    few = torch.tensor([-INF, 0.0, INF] if rule.scoring == "sigmoid" else [-1.0, 0.0, -0.0, 1.0])
    logits = few[torch.randint(0, len(few), (12, rule.num_experts), generator=generator)]
    logits[0] = 0.0
    bias = torch.randint(-1, 2, (rule.num_experts,), generator=generator) * 0.25 if rule.has_bias else None
    check(logits, rule, bias, device)
    if not rule.has_bias:
        ids, _ = run(logits[:1], rule, bias, device)
        assert ids.tolist() == [list(range(rule.top_k))]


def test_the_bias_moves_the_choice_and_not_the_weights(device: torch.device) -> None:
    rule = Routing(8, 2, "sigmoid", renormalize=False, has_bias=True)
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0]])
    bias = torch.zeros(8)
    bias[[5, 7]] = torch.tensor([4.0, 8.0])
    ids, weights = run(logits, rule, bias, device)
    assert ids.tolist() == [[7, 5]]
    torch.testing.assert_close(weights, torch.sigmoid(logits[:, [7, 5]]), rtol=RTOL, atol=0)


def test_a_negative_choice_of_a_kept_group_precedes_other_groups(device: torch.device) -> None:
    """Masking with 0 instead of leaving out would take experts 4 and 5 here."""
    rule = Routing(8, 3, "sigmoid", has_bias=True, num_groups=2, kept_groups=1)
    bias = torch.tensor([5.0, 5.0, -3.0, -4.0, 1.0, 1.0, 1.0, 1.0])
    ids, _ = run(torch.zeros(1, 8), rule, bias, device)
    assert ids.tolist() == [[0, 1, 2]]
    bias[2:4] = -INF
    ids, _ = run(torch.zeros(1, 8), rule, bias, device)
    assert ids.tolist() == [[0, 1, 2]]


def test_two_experts_speak_for_a_group(device: torch.device) -> None:
    """Group 0 has the best expert and the most in all, group 1 the best pair."""
    rule = Routing(8, 2, "sigmoid", has_bias=True, num_groups=2, kept_groups=1)
    bias = torch.tensor([4.0, 2.0, 2.0, 2.0, 3.5, 3.0, 0.0, 0.0])
    ids, _ = run(torch.zeros(1, 8), rule, bias, device)
    assert ids.tolist() == [[4, 5]]


@pytest.mark.parametrize("name", ["mixtral", "qwen2", "deepseek-v3", "odd groups", "groups of two", "largest"])
@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rows_that_are_not_finite(name: str, value: float, device: torch.device) -> None:
    """NaN first, as the reference; ids distinct and in range whatever comes; other rows untouched."""
    rule = RULES[name]
    logits, bias = make(rule, 5, 5)
    logits[0] = value
    logits[1, rule.num_experts // 2] = value
    logits[2, ::3] = value
    logits[3, -1] = value
    logits[3, 0] = NAN
    ids, weights = run(logits, rule, bias, device)
    expected_ids, expected = route_ref(logits, rule, bias)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights.double(), expected, rtol=RTOL, atol=0, equal_nan=True)
    assert ids.min() >= 0
    assert ids.max() < rule.num_experts
    assert all(len(set(row)) == rule.top_k for row in ids.tolist())
    assert weights[4].isfinite().all()
    assert weights[3].isnan().any()


def test_a_bias_of_nan_is_chosen_first(device: torch.device) -> None:
    logits, bias = make(DEEPSEEK_V3, 3, 6)
    bias[[77, 200]] = NAN
    weights = check(logits, DEEPSEEK_V3, bias, device)
    ids, _ = run(logits, DEEPSEEK_V3, bias, device)
    assert ids[:, :2].tolist() == [[77, 200]] * 3
    assert weights.isfinite().all()


def test_all_scores_zero_give_zero_weights(device: torch.device) -> None:
    ids, weights = run(torch.full((1, 16), -INF), Routing(16, 4, "sigmoid"), None, device)
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert weights.tolist() == [[0.0] * 4]


def test_strides_and_nothing_written_beside(device: torch.device) -> None:
    """Rows of wider tensors, NaN around the logits; what lies between the results' rows stays."""
    rule = RULES["odd groups"]
    made, _ = make(rule, 5, 7)
    logits = torch.full((5, 200), NAN, device=device)
    logits[:, 8:168] = made.to(device)
    ids = torch.full((5, 11), -7, dtype=torch.int32, device=device)
    weights = torch.full((5, 9), NAN, device=device)
    got = route(logits[:, 8:168], rule, ids=ids[:, 2:8], weights=weights[:, 1:7])
    assert got[0].data_ptr() == ids[:, 2:8].data_ptr()
    expected_ids, expected = route_ref(made, rule)
    assert torch.equal(ids[:, 2:8].cpu(), expected_ids)
    torch.testing.assert_close(weights[:, 1:7].cpu().double(), expected, rtol=RTOL, atol=0)
    assert (ids[:, [0, 1, 8, 9, 10]] == -7).all()
    assert weights[:, [0, 7, 8]].isnan().all()


def test_no_tokens(device: torch.device) -> None:
    ids, weights = route(torch.empty(0, 8, device=device), RULES["mixtral"])
    assert ids.shape == weights.shape == (0, 2)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_wide_logits_do_not_overflow(device: torch.device) -> None:
    logits = torch.tensor([[1000.0, 999.0, -1000.0, 500.0], [-200.0, -201.0, -3e38, -300.0]])
    for rule in (Routing(4, 2), Routing(4, 2, renormalize=False)):
        check(logits, rule, None, device)
    _, weights = run(logits, Routing(4, 2, "sigmoid"), None, device)
    assert weights.tolist() == [[0.5, 0.5], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 9}, "top_k: expected 1 to 8, of the experts in the kept groups; got 9"),
        ({"top_k": 0}, "top_k: expected 1 to 8"),
        ({"num_experts": 64, "top_k": 17}, "top_k: expected 1 to 16"),
        ({"num_experts": 1025}, "num_experts: expected 1 to 1024; got 1025"),
        ({"num_experts": 0}, "num_experts: expected 1 to 1024; got 0"),
        ({"scoring": "tanh"}, "scoring: expected one of softmax, sigmoid; got 'tanh'"),
        ({"has_bias": True}, "has_bias: expected False with softmax; got True"),
        ({"num_groups": 2}, "num_groups: expected 1 with softmax; got 2"),
        ({"scoring": "sigmoid", "num_groups": 3}, "num_groups: expected a divisor of the 8 experts; got 3"),
        ({"scoring": "sigmoid", "num_groups": 0}, "num_groups: expected a divisor of the 8 experts; got 0"),
        ({"scoring": "sigmoid", "num_groups": 8}, "num_groups: expected two or more of the 8 experts in each group"),
        ({"scoring": "sigmoid", "num_groups": 4, "kept_groups": 5}, "kept_groups: expected 1 to num_groups = 4; got 5"),
        ({"scoring": "sigmoid", "num_groups": 4, "top_k": 3}, "top_k: expected 1 to 2, of the experts in the kept"),
        ({"scaling_factor": NAN}, "scaling_factor: expected a finite number above 0; got nan"),
        ({"scaling_factor": 0.0}, "scaling_factor: expected a finite number above 0; got 0.0"),
    ],
)
def test_rules_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Routing(**({"num_experts": 8, "top_k": 2} | arguments))


def test_bad_arguments_are_refused(device: torch.device) -> None:
    rule = Routing(8, 2, "sigmoid", has_bias=True)
    plain = dataclasses.replace(rule, has_bias=False)
    logits, bias = torch.zeros(3, 8, device=device), torch.zeros(8, device=device)
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("logits: expected bfloat16 or float32 (T, 8); got torch.float32 (3, 7)", (logits[:, :7], rule, bias), {}),
        ("logits: expected bfloat16 or float32 (T, 8); got torch.float64", (logits.double(), rule, bias), {}),
        ("logits: expected a contiguous last axis; got stride (1, 8)", (torch.zeros(8, 8).T, plain), {}),
        ("bias: expected float32 (8,); got None", (logits, rule), {}),
        ("bias: expected float32 (8,); got torch.bfloat16 (8,)", (logits, rule, bias.bfloat16()), {}),
        ("bias: expected None: the rule has no bias", (logits, plain, bias), {}),
        ("ids: expected torch.int32 (3, 2); got torch.int64", (logits, plain), {"ids": torch.zeros(3, 2).long()}),
        ("weights: expected torch.float32 (3, 2)", (logits, plain), {"weights": torch.zeros(2, 2, device=device)}),
    ]
    for message, arguments, options in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            route(*arguments, **options)
