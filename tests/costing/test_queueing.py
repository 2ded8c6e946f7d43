"""Waits on one and on many servers, against a simulation step by step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenfab.costing.workload.queueing import waits_s


def by_hand(arrival_s: list[float], service_s: list[float], num_servers: int) -> list[float]:
    """Each request takes the server that is free first."""
    free = [-1e9] * num_servers
    waits = []
    for arrival, service in zip(arrival_s, service_s, strict=True):
        server = free.index(min(free))
        start = max(arrival, free[server])
        free[server] = start + service
        waits.append(start - arrival)
    return waits


requests = st.lists(st.tuples(st.floats(0, 10), st.floats(0.01, 5)), min_size=1, max_size=40)


@given(requests, st.integers(1, 6), st.floats(-100, 100))
def test_waits_are_those_of_a_simulation(requests: list[tuple[float, float]], num_servers: int, shift: float) -> None:
    arrival = [shift + time for time in sorted(time for time, _ in requests)]
    service = [service for _, service in requests]
    found = waits_s(np.array(arrival), np.array(service), num_servers)
    assert found == pytest.approx(by_hand(arrival, service, num_servers), abs=1e-9)


@given(requests, st.integers(1, 5))
def test_a_server_more_never_makes_a_wait_longer(requests: list[tuple[float, float]], num_servers: int) -> None:
    arrival, service = np.array(sorted(time for time, _ in requests)), np.array([service for _, service in requests])
    assert (waits_s(arrival, service, num_servers + 1) <= waits_s(arrival, service, num_servers) + 1e-9).all()


def test_poisson_arrivals_wait_as_the_formula_says() -> None:
    """M/D/1 at 80 % load waits rho / (2 (1 - rho)) services on average."""
    generator = np.random.default_rng(0)
    arrival = np.cumsum(generator.exponential(1 / 0.8, 400_000))
    assert waits_s(arrival, np.ones(len(arrival)), 1).mean() == pytest.approx(0.8 / (2 * 0.2), rel=0.05)


@pytest.mark.parametrize(
    ("arrival", "service", "servers", "message"),
    [
        ([], [], 1, "service_s: expected one for each of the arrivals, and some; got 0 for 0"),
        ([0.0, 1.0], [1.0], 1, "service_s: expected one for each .* got 1 for 2"),
        ([1.0, 0.0], [1.0, 1.0], 1, "arrival_s: expected finite times in order"),
        ([0.0, np.nan], [1.0, 1.0], 1, "arrival_s: expected finite times in order"),
        ([0.0, 1.0], [1.0, 0.0], 1, "service_s: expected positive times"),
        ([0.0, 1.0], [1.0, np.inf], 1, "service_s: expected positive times"),
        ([0.0], [1.0], 0, "num_servers: expected at least 1; got 0"),
    ],
)
def test_what_cannot_be_queued_is_said(arrival: list[float], service: list[float], servers: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        waits_s(np.array(arrival), np.array(service), servers)
