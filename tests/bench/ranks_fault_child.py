"""One rank of a test in which a rank fails: ``python -m tokenfab.tests.bench.ranks_fault_child HOW TIMEOUT_S``.

Rank 1 fails in the middle of an exchange; rank 0 must end with an error, by itself and in time.
"""

from __future__ import annotations

import os
import sys
import time

import torch
from tokenfab.bench.ranks_group import RankFailed, RankGroup, joined


def _fail(how: str, group: RankGroup) -> None:
    if how == "dies":
        os._exit(3)
    if how == "raises":
        raise ValueError("weights: expected some; got none")
    if how == "hangs":
        time.sleep(3600)
    if how == "stuck":  # rank 0 waits where no connection is looked at, as inside of a GPU
        time.sleep(3600)


def _expert_layer(group: RankGroup, how: str) -> None:
    """The real thing: rank 1 fails between dispatch and combine."""
    from tokenfab.bench import interpreter, ranks_ops
    from tokenfab.tests.bench.ranks_layer_cases import Exchanged, inputs

    interpreter.install()
    torch.set_num_threads(1)
    both = Exchanged(group, "bf16-bf16", [3, 3])
    right = ranks_ops.expert_rows

    def failing(*args: object) -> torch.Tensor:
        if group.rank == 1:
            _fail(how, group)
        return right(*args)  # type: ignore[arg-type]

    ranks_ops.expert_rows = failing  # type: ignore[assignment]
    both.outputs(*inputs([3, 3]))


def main(how: str, timeout_s: float) -> None:
    with joined(torch.device("cpu"), timeout_s=timeout_s) as group:
        group.numbers([1.0])
        print(f"rank {group.rank} joined", flush=True)
        if how.startswith("layer "):
            _expert_layer(group, how.removeprefix("layer "))
            return
        if group.rank == 1:
            _fail(how, group)
        elif how == "stuck":
            with group.waiting("replay"):
                time.sleep(3600)
        else:
            group.all_to_all(torch.empty(2, 2), torch.ones(2, 2))


if __name__ == "__main__":
    begin_s = time.monotonic()
    try:
        main(sys.argv[1], float(sys.argv[2]))
    except (RankFailed, ValueError) as error:
        print(f"error: {error} ({time.monotonic() - begin_s:.1f} s)", flush=True)
        os._exit(2)
    print("no error", flush=True)
