"""One rank of a test: runs the cases of a group and writes what came of each to FOLDER/rankN.json.

``python -m tokenfab.tests.bench.ranks_child GROUP FOLDER``, under torchrun.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenfab.bench import interpreter
from tokenfab.bench.ranks_group import RankGroup, joined

Case = Callable[[RankGroup], bool]


def cases(name: str) -> dict[str, Case]:
    if name == "layers":
        from tokenfab.tests.bench.ranks_layer_cases import CASES
    elif name == "steps":
        from tokenfab.tests.bench.ranks_step_cases import CASES
    else:
        from tokenfab.tests.bench.ranks_measure_cases import CASES
    return CASES


def main(name: str, folder: str) -> None:
    interpreter.install()
    torch.set_num_threads(1)
    with joined(torch.device("cpu"), timeout_s=200) as group:
        found = {}
        for case, run in cases(name).items():
            begin_s = time.process_time()
            found[case] = bool(run(group))
            print(f"rank {group.rank}: {case}: {found[case]}, {time.process_time() - begin_s:.1f} s", flush=True)
        Path(folder, f"rank{group.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
