"""Routing against a naive simulation that shares no code, and the endless cache against a trie of the trace's JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenfab.costing.workload.routing import POLICIES, Pace, Routed, Router, Simulation, simulate
from tokenfab.costing.workload.routing_load import Load
from tokenfab.costing.workload.synthetic import Mix, SyntheticRequest, chunks_of, synthetic_requests, write_mooncake
from tokenfab.costing.workload.traces import Chunk, open_trace

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the published traces are not beside this checkout")

Request = tuple[float, int, int, Sequence[int]]  # seconds, input, output, blocks


# -- the naive simulation --------------------------------------------------------------------------


def hashed(x: int) -> int:
    mask = 2**64 - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def naive(requests: Sequence[Request], router: Router) -> tuple[list[int], list[int]]:
    """The replica and the blocks that hit of each request. Caches are lists, least recent first."""
    caches: list[list[int]] = [[] for _ in range(router.replicas)]
    given = [0] * router.replicas
    free = [0.0] * router.replicas
    sent: list[tuple[int, float, float, int, int]] = []  # replica, prefilled, finished, new tokens, blocks
    chosen, hits = [], []

    def leading(replica: int, blocks: Sequence[int]) -> int:
        held = 0
        while held < len(blocks) and blocks[held] in caches[replica]:
            held += 1
        return held

    for number, (now, inputs, outputs, blocks) in enumerate(requests):

        def score(replica: int, now: float = now, inputs: int = inputs, blocks: Sequence[int] = blocks) -> Any:
            new = max(0, inputs - 512 * leading(replica, blocks))
            waiting = sum(row[3] for row in sent if row[0] == replica and row[1] > now)
            active = sum(row[4] for row in sent if row[0] == replica and row[2] > now) + len(blocks)
            cost = router.prefill_weight * (waiting + new) / 512 + active
            return cost, given[replica], replica

        everyone = range(router.replicas)
        if router.policy == "random":
            replica = hashed((number + hashed(router.seed)) % 2**64) % router.replicas
        elif router.policy == "round_robin":
            replica = number % router.replicas
        elif router.policy == "sticky":
            replica = hashed(blocks[:2][-1]) % router.replicas
        elif router.policy == "kv_aware":
            replica = min(everyone, key=score)
        else:
            active = [sum(1 for row in sent if row[0] == each and row[2] > now) for each in everyone]
            longest = max(everyone, key=lambda each: leading(each, blocks))
            if max(active) - min(active) > 64 and max(active) > 1.5 * min(active):
                replica = min(everyone, key=lambda each: (active[each], given[each], each))
            elif min(512 * leading(longest, blocks), inputs) / inputs > 0.3:
                replica = min(everyone, key=lambda each: (-leading(each, blocks), active[each], given[each], each))
            else:
                replica = min(everyone, key=lambda each: (len(caches[each]), given[each], each))
        hit = leading(replica, blocks)
        chosen.append(replica)
        hits.append(hit)
        cache = caches[replica]
        for block in reversed(blocks):
            if block in cache:
                cache.remove(block)
            cache.append(block)
        if router.cache_blocks is not None:
            del cache[: max(0, len(cache) - router.cache_blocks)]
        new = inputs - min(512 * hit, inputs - 1)
        free[replica] = max(now, free[replica]) + new / router.pace.prefill_tokens_per_s
        finished = free[replica] + outputs / router.pace.tokens_per_s_per_user
        sent.append((replica, free[replica], finished, new, len(blocks)))
        given[replica] += 1
    return chosen, hits


def check(requests: Sequence[Request], routed: Routed) -> None:
    chosen, hits = naive(requests, routed.router)
    inputs = [row[1] for row in requests]
    cached = [min(512 * hit, tokens - 1) for hit, tokens in zip(hits, inputs, strict=True)]
    assert routed.cached_tokens.tolist() == cached
    assert routed.hit_blocks == sum(hits)
    replicas = range(routed.router.replicas)
    assert routed.requests_of.tolist() == [chosen.count(each) for each in replicas]
    work = [
        sum(tokens - hit for at, tokens, hit in zip(chosen, inputs, cached, strict=True) if at == each)
        for each in replicas
    ]  # fmt: skip
    assert routed.prefilled_tokens_of.tolist() == work
    assert routed.input_tokens == sum(inputs)
    assert routed.hit_rate == pytest.approx(sum(cached) / sum(inputs))
    assert routed.imbalance == pytest.approx(max(work) * len(work) / sum(work))


def rows_of(requests: Sequence[SyntheticRequest]) -> list[Request]:
    start = requests[0].timestamp_ms
    return [((row.timestamp_ms - start) * 1e-3, row.input_tokens, row.output_tokens, row.block_ids) for row in requests]


def run(chunks: Sequence[Chunk], routers: Sequence[Router]) -> list[Routed]:
    simulation = Simulation(routers)
    for chunk in chunks:
        simulation.add(chunk)
    return simulation.results()


BUSY = Pace(prefill_tokens_per_s=6000, tokens_per_s_per_user=15)
CHATS = Mix(requests_per_s=12, applications=4, open_sessions=30, text_tokens=1200, output_tokens=150)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("replicas", "blocks"), [(1, 40), (3, 7), (3, 25), (3, 100), (4, None), (8, 60), (11, 30), (11, 1), (20, 12)]
)
def test_caches_equal_a_naive_list(policy: str, replicas: int, blocks: int | None) -> None:
    made = list(synthetic_requests(260, seed=11, mix=CHATS))
    for pace, weight in ((BUSY, 1.0), (Pace(), 0.25)):
        router = Router(policy, replicas, blocks, pace, seed=5, prefill_weight=weight)
        (found,) = run(list(chunks_of(made, 83)), [router])
        check(rows_of(made), found)


@needs_traces
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["mooncake_conversation.jsonl", "mooncake_synthetic.jsonl"])
def test_published_sample_equals_a_naive_list(policy: str, name: str, tmp_path: Path) -> None:
    sample = (TRACES / name).read_text().splitlines()[:400]
    path = tmp_path / "sample"
    path.write_text("\n".join(sample))
    rows = [json.loads(text) for text in sample]
    requests = [(row["timestamp"] * 1e-3, row["input_length"], row["output_length"], row["hash_ids"]) for row in rows]
    routers = [Router(policy, 4, size) for size in (60, 1000)]
    for found in simulate(open_trace(path), routers):
        check(requests, found)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_tree_of_requests_equals_a_naive_list(data: st.DataObject) -> None:
    """Paths of a random tree: partial blocks, whole repeats, caches smaller than a path."""
    parents = [-1]
    for node in range(1, data.draw(st.integers(2, 40))):
        parents.append(data.draw(st.integers(-1, node - 1)))
    paths = []
    for node in range(len(parents)):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        paths.append(path)
    picks = data.draw(st.lists(st.integers(0, len(parents) - 1), min_size=1, max_size=60))
    fills = data.draw(st.lists(st.integers(1, 512), min_size=len(picks), max_size=len(picks)))
    made = [
        SyntheticRequest(40 * number, 512 * (len(paths[node]) - 1) + fill, 1 + number % 30, tuple(paths[node]))
        for number, (node, fill) in enumerate(zip(picks, fills, strict=True))
    ]
    policy = data.draw(st.sampled_from(POLICIES))
    router = Router(policy, data.draw(st.integers(1, 10)), data.draw(st.integers(1, 12)), BUSY)
    (found,) = run(list(chunks_of(made, 7)), [router])
    check(rows_of(made), found)


def test_uneven_load_overrules_the_match() -> None:
    """One session of long answers: past 64 more than the idlest, cache_aware sends it elsewhere."""
    made = [SyntheticRequest(number, 1024, 10_000, (0, 1)) for number in range(70)]
    (found,) = run(list(chunks_of(made)), [Router("cache_aware", 2, 10)])
    check(rows_of(made), found)
    assert found.requests_of.tolist() == [65, 5]


@pytest.mark.parametrize(("active", "chosen"), [([165, 100], 1), ([265, 200], 0), ([150, 100], 0), ([64, 0], 0)])
def test_what_uneven_load_is(active: list[int], chosen: int) -> None:
    """Both more than 64 requests and more than 1.5 times."""
    load = Load(Router("cache_aware", 2, 10))
    load.active_requests = active
    assert load.longest_match([2, 0], 1024, [2, 0]) == chosen


def test_a_partial_block_is_credited_as_what_it_holds() -> None:
    load = Load(Router("kv_aware", 2, 10))
    load._costs = [1000.0, 100.0]
    assert load.least_cost([2, 0], 600) == 1  # 1000 - 600 against 100
    assert load.least_cost([2, 0], 1024) == 0


# -- the endless cache -----------------------------------------------------------------------------


def trie_hits(rows: Sequence[dict[str, Any]]) -> tuple[int, int, int, int]:
    """Blocks that hit, blocks, tokens that hit and tokens, by walking a trie of nested dicts."""
    root: dict[int, Any] = {}
    hit = blocks = hit_tokens = tokens = 0
    for row in rows:
        node, matching, filled, length = root, True, 0, row["input_length"]
        for position, block in enumerate(row["hash_ids"]):
            matching = matching and block in node
            if matching:
                hit += 1
                filled += min(512, length - 512 * position)
            node = node.setdefault(block, {})
        blocks += len(row["hash_ids"])
        hit_tokens += filled - (filled == length)  # the last token of a prompt is always computed
        tokens += length
    return hit, blocks, hit_tokens, tokens


@needs_traces
@pytest.mark.parametrize(
    ("name", "in_blocks", "in_tokens"),
    [("mooncake_conversation.jsonl", 0.366412, 0.373623), ("mooncake_synthetic.jsonl", 0.639604, 0.651241)],
)
def test_endless_cache_equals_a_trie(name: str, in_blocks: float, in_tokens: float) -> None:
    rows = [json.loads(text) for text in (TRACES / name).read_text().splitlines()]
    hit, blocks, hit_tokens, tokens = trie_hits(rows)
    one, many = simulate(open_trace(TRACES / name), [Router("random", 1, None), Router("sticky", 8, 10**9)])
    assert (one.hit_blocks, one.blocks) == (hit, blocks)
    assert (one.bound_blocks, one.bound_tokens, one.input_tokens) == (hit, hit_tokens, tokens)
    assert int(one.cached_tokens.sum()) == hit_tokens
    assert one.of_bound == 1
    assert one.hit_rate_blocks == pytest.approx(in_blocks, abs=1e-6)
    assert one.hit_rate == pytest.approx(in_tokens, abs=1e-6)
    assert (many.bound_blocks, many.bound) == (hit, one.hit_rate)
    assert many.hit_rate < one.hit_rate


@given(st.integers(0, 3000), st.integers(1, 400))
@settings(max_examples=15, deadline=None)
def test_bound_is_that_of_a_trie_in_any_chunks(seed: int, size: int) -> None:
    made = list(synthetic_requests(400, seed=seed, mix=CHATS))
    rows = [{"input_length": row.input_tokens, "hash_ids": row.block_ids} for row in made]
    (found,) = run(list(chunks_of(made, size)), [Router("random", 2, None)])
    assert (found.bound_blocks, found.blocks, found.bound_tokens, found.input_tokens) == trie_hits(rows)


# -- what holds of any -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_more_cache_hits_more_and_the_bound_bounds(policy: str) -> None:
    made = list(chunks_of(synthetic_requests(3000, seed=2, mix=CHATS), 500))
    if policy in ("kv_aware", "cache_aware"):  # where requests go depends on the caches
        sizes = [10, 100, 1000, None]
        found = run(made, [Router(policy, 4, size) for size in sizes])
        assert all(b.hit_blocks >= 0.9 * a.hit_blocks for a, b in pairwise(found))
    else:  # LRU has no Belady anomaly
        found = run(made, [Router(policy, 4, size) for size in (1, 5, 10, 30, 100, 300, 1000, None)])
        assert all(b.hit_blocks >= a.hit_blocks for a, b in pairwise(found))
    for each in found:
        assert 0 <= each.hit_rate <= each.bound < 1
        assert (each.cached_tokens >= 0).all()
        assert each.of_bound is not None
        assert 0 <= each.of_bound <= 1
        assert 1 <= each.imbalance <= 4


def test_chunks_and_company_change_nothing() -> None:
    made = list(synthetic_requests(900, seed=4, mix=CHATS))
    routers = [Router(policy, 5, 50, BUSY, seed=3) for policy in POLICIES]
    together = run(list(chunks_of(made, 900)), routers)
    for router, found in zip(routers, together, strict=True):
        (alone,) = run(list(chunks_of(made, 13)), [router])
        assert np.array_equal(alone.cached_tokens, found.cached_tokens)
        assert np.array_equal(alone.requests_of, found.requests_of)


@pytest.mark.parametrize("scale", [1, 10**6 + 1, 0x9E3779B97F4A7C15])
def test_ids_that_do_not_count_up(scale: int) -> None:
    """Hashes as ids give what numbers give; sticky hashes the id itself."""
    made = list(synthetic_requests(900, seed=4, mix=CHATS))
    renamed = [replace(row, block_ids=tuple(each * scale % 2**62 for each in row.block_ids)) for row in made]
    for policy in ("random", "kv_aware", "cache_aware"):
        (a,) = run(list(chunks_of(made, 100)), [Router(policy, 4, 60)])
        (b,) = run(list(chunks_of(renamed, 100)), [Router(policy, 4, 60)])
        assert np.array_equal(a.cached_tokens, b.cached_tokens)
        assert (a.bound_blocks, a.requests_of.tolist()) == (b.bound_blocks, b.requests_of.tolist())
    (found,) = run(list(chunks_of(renamed, 100)), [Router("sticky", 4, 60)])
    check(rows_of(renamed), found)


def test_a_hot_prefix_keeps_no_history() -> None:
    """Requests that only hit evict nothing; what they owned must not pile up."""
    made = [SyntheticRequest(number, 600 + number % 2, 5, (0, 1 + number % 2)) for number in range(5000)]
    simulation = Simulation([Router("random", 1, 10)])
    for chunk in chunks_of(made, 1000):
        simulation.add(chunk)
    assert sum(map(len, simulation.states[0].caches._queues)) < 100
    assert simulation.results()[0].hit_blocks == 2 * 5000 - 3


def test_evicted_requests_leave_no_history() -> None:
    made = list(synthetic_requests(2000, seed=1, mix=CHATS))
    simulation = Simulation([Router("kv_aware", 2, 30)])
    for chunk in chunks_of(made, 500):
        simulation.add(chunk)
    caches = simulation.states[0].caches
    assert sum(map(len, caches._owners)) <= sum(caches.sizes) <= 60
    assert sum(map(len, caches._queues)) < 250


# -- what is refused -------------------------------------------------------------------------------


def test_ids_must_name_prefixes() -> None:
    two_places = [SyntheticRequest(0, 1024, 1, (0, 1)), SyntheticRequest(0, 1024, 1, (2, 1))]
    with pytest.raises(ValueError, match="trace: line 2: hash_ids: 1 follows another block"):
        run(list(chunks_of(two_places)), [Router("random", 1, 5)])
    with pytest.raises(ValueError, match="line 2: hash_ids: 1 follows another block"):
        run(list(chunks_of(two_places, 1)), [Router("random", 1, 5)])
    twice = [SyntheticRequest(0, 1536, 1, (3, 4, 3))]
    with pytest.raises(ValueError, match="line 1: hash_ids: 3 follows another block"):
        run(list(chunks_of(twice)), [Router("random", 1, 5)])


def test_r28_absurd_routers_are_named(tmp_path: Path) -> None:
    for change, words in (
        ({"policy": "best"}, "policy: expected one of random, .*; got 'best'"),
        ({"replicas": 0}, "replicas: expected 1 to 1024; got 0"),
        ({"cache_blocks": 0}, "cache_blocks: expected at least 1, of 512 tokens; got 0"),
        ({"prefill_weight": -1.0}, "prefill_weight: expected 0 or more; got -1"),
        ({"prefill_weight": float("nan")}, "prefill_weight"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            replace(Router("random", 8, 10), **change)
    for pace in ({"prefill_tokens_per_s": 0}, {"tokens_per_s_per_user": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(pace))):
            Pace(**pace)
    with pytest.raises(ValueError, match="routers: expected at least one"):
        Simulation([])
    with pytest.raises(ValueError, match="trace: expected at least one request"):
        Simulation([Router("random", 8, 10)]).results()
    path = tmp_path / "azure"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n")
    with pytest.raises(ValueError, match="hash_ids: an Azure trace has no prefix information: .*unknown"):
        simulate(open_trace(path), [Router("random", 8, 10)])


def test_default_pace_is_deepseeks_day() -> None:
    assert Pace().prefill_tokens_per_s == pytest.approx(32_207, rel=1e-4)
    assert Pace().tokens_per_s_per_user == 21


def test_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    made = list(synthetic_requests(800, seed=9, mix=CHATS))
    write_mooncake(path, made)
    seen: list[int] = []
    (found,) = simulate(open_trace(path), [Router("kv_aware", 3, 50)], lambda done, total: seen.append(done))
    check(rows_of(made), found)
    assert seen[-1] == path.stat().st_size
