"""How long requests wait for a server: first come, first served, exactly, on a trace's own arrivals.

    start_i = max(arrival_i, the earliest time at which one of the servers is free), wait_i = start_i - arrival_i

Bursts are the trace's, not a distribution's: no Poisson arrivals are assumed. Units: seconds.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def waits_s(arrival_s: np.ndarray, service_s: np.ndarray, num_servers: int) -> np.ndarray:
    """The wait of every request before its service begins.

    Args:
        arrival_s: sorted. service_s: of the same length, more than 0. num_servers: at least 1; they are alike.

    Raises:
        ValueError: none of either, unsorted or not finite arrivals, a service that is not positive, no server.
    """
    import numpy as np

    if num_servers < 1:
        raise ValueError(f"num_servers: expected at least 1; got {num_servers}")
    if len(arrival_s) == 0 or len(arrival_s) != len(service_s):
        raise ValueError(
            f"service_s: expected one for each of the arrivals, and some; got {len(service_s)} for {len(arrival_s)}"
        )
    if not np.isfinite(arrival_s).all() or (np.diff(arrival_s) < 0).any():
        raise ValueError("arrival_s: expected finite times in order")
    if not (np.isfinite(service_s) & (service_s > 0)).all():
        raise ValueError("service_s: expected positive times")
    ends = np.sort(arrival_s + service_s)  # if nobody waited
    busy = np.arange(1, len(arrival_s) + 1) - np.searchsorted(ends, arrival_s, side="right")
    if busy.max() <= num_servers:
        return np.zeros(len(arrival_s))
    if num_servers == 1:  # Lindley: i starts at the largest of arrival_j - work before j, plus the work before i
        work = np.cumsum(service_s)
        before = work - service_s
        return np.maximum.accumulate(arrival_s - before) + before - arrival_s
    free = [float(arrival_s[0])] * num_servers  # a heap
    found = []
    for arrival, service in zip(arrival_s.tolist(), service_s.tolist(), strict=True):
        start = free[0]
        if start < arrival:  # quicker than max()
            start = arrival
        heapq.heapreplace(free, start + service)
        found.append(start - arrival)
    return np.array(found)
