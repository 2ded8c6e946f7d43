"""A driver that a test can kill: inspects the fake points on a cluster. ``ADDRESS CACHE COUNT`` -> JSON on stdout."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from tokenfab.bench import fleet_compile
from tokenfab.bench.fleet_compile import compile_on
from tokenfab.bench.fleet_ray import connect
from tokenfab.bench.inspect import Inspection, inspect
from tokenfab.tests.bench import fleet_fakes


def as_rows(found: list[Inspection]) -> list[dict[str, Any]]:
    """What a caller sees, as JSON holds it, but for whether it came from the cache."""
    return json.loads(json.dumps([{**dataclasses.asdict(each), "cached": None} for each in found]))


def main(address: str, cache: str, count: str) -> None:
    fleet_compile.WORKER = f"{fleet_fakes.__name__}:compile_point"
    with connect(address) as cluster:
        found = inspect(
            fleet_fakes.points(int(count)), ["sm_90"], cache_dir=Path(cache), compile_all=compile_on(cluster.spread)
        )
    cached = sum(each.cached for each in found)
    print(json.dumps({"cached": cached, "rows": as_rows(found)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
