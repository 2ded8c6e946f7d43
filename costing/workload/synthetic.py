"""Made-up requests that share prefixes as chats do, for tests and for measuring speed. Not a model of any service.

Sessions of some applications, each with a system prompt of its own; a turn sends the session so far and new text, and
its answer joins the next prompt. Ids count up as in a Mooncake trace: a full block keeps its id, the partial last one
gets a new id each turn. Arrivals are Poisson. The same seed gives the same requests; memory is that of the sessions
that are open.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec

from .traces import BLOCK_TOKENS, Chunk


@dataclass(frozen=True)
class Mix:
    """What the requests are like: Poisson rate, open sessions, and means of exponential lengths (in tokens)."""

    requests_per_s: float = 20.0
    applications: int = 32
    system_tokens: int = 1500
    open_sessions: int = 400
    turns: float = 6.0
    text_tokens: float = 2200.0
    output_tokens: float = 300.0
    max_tokens: int = 32_768


@dataclass(frozen=True)
class SyntheticRequest:
    timestamp_ms: int
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...]


def synthetic_requests(count: int, seed: int = 0, mix: Mix | None = None) -> Iterator[SyntheticRequest]:
    """``count`` requests in order of time.

    Raises:
        ValueError: a negative count.
    """
    if count < 0:
        raise ValueError(f"count: expected 0 or more; got {count}")
    mix = mix or Mix()
    draw = random.Random(seed)
    next_id = 0
    prompts = []
    for _ in range(mix.applications):
        tokens = max(1, round(draw.expovariate(1 / mix.system_tokens)))
        full = tokens // BLOCK_TOKENS
        prompts.append((tokens, list(range(next_id, next_id + full))))
        next_id += full
    sessions: list[tuple[int, list[int]]] = []  # tokens so far, ids of the full blocks
    now_s = 0.0
    for _ in range(count):
        now_s += draw.expovariate(mix.requests_per_s)
        if len(sessions) < mix.open_sessions or draw.random() < 1 / mix.turns:
            place = len(sessions) if len(sessions) < mix.open_sessions else draw.randrange(mix.open_sessions)
            tokens, blocks = draw.choice(prompts)
            blocks = list(blocks)
        else:
            place = draw.randrange(mix.open_sessions)
            tokens, blocks = sessions[place]
        tokens += 1 + int(draw.expovariate(1 / mix.text_tokens))
        output = 1 + int(draw.expovariate(1 / mix.output_tokens))
        full, partial = divmod(tokens, BLOCK_TOKENS)
        new = full - len(blocks)
        blocks += range(next_id, next_id + new)
        next_id += new
        ids = blocks
        if partial:
            ids = [*blocks, next_id]
            next_id += 1
        yield SyntheticRequest(int(now_s * 1e3), tokens, output, tuple(ids))
        entry = (tokens + output, blocks)
        if entry[0] > mix.max_tokens:  # too long: the next turn begins anew
            tokens, blocks = draw.choice(prompts)
            entry = (tokens, list(blocks))
        if place == len(sessions):
            sessions.append(entry)
        else:
            sessions[place] = entry


def write_mooncake(path: Path, requests: Iterable[SyntheticRequest]) -> int:
    """Requests as a Mooncake trace; how many there were."""
    count, encode = 0, msgspec.json.Encoder().encode
    with path.open("wb") as file:
        for each in requests:
            row = {
                "timestamp": each.timestamp_ms, "input_length": each.input_tokens,
                "output_length": each.output_tokens, "hash_ids": each.block_ids,
            }  # fmt: skip
            file.write(encode(row) + b"\n")
            count += 1
    return count


def chunks_of(requests: Iterable[SyntheticRequest], size: int = 10_000) -> Iterator[Chunk]:
    """Requests as the columns that a reader yields."""
    import numpy as np

    left, first, start_ms = iter(requests), 0, None
    while rows := list(islice(left, size)):
        start_ms = rows[0].timestamp_ms if start_ms is None else start_ms
        counts = [len(row.block_ids) for row in rows]
        yield Chunk(
            first, (np.array([row.timestamp_ms for row in rows], np.float64) - start_ms) * 1e-3,
            np.array([row.input_tokens for row in rows]), np.array([row.output_tokens for row in rows]),
            np.array([each for row in rows for each in row.block_ids], np.int64),
            np.concatenate(([0], np.cumsum(counts))),
        )  # fmt: skip
        first += len(rows)
