"""Row 25 from the record's side: a report made from records whose every free text is markup, in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages import opened
from tokenfab.bench.published import MEASURED_HERE
from tokenfab.bench.records import RecordStore
from tokenfab.costing.report.cost_view import write_report
from tokenfab.costing.study import run_study, study
from tokenfab.tests.bench.recorded_points import recorded
from tokenfab.tests.costing.test_report import HOSTILE

# of Qwen3-30B-A3B on one GPU, at 64 and 128 sequences
QKV = {"n": 5120, "k": 2048}
W8A8 = {"weight": "fp8_block", "activation": "fp8_group"}


def test_r25_hostile_records(browser: Any, tmp_path: Path) -> None:
    """Names and versions of the machine, commit, process, tile: nothing of them is alive, and the points are drawn."""
    texts: dict[str, Any] = dict.fromkeys(("name", "uuid", "driver", "cuda", "torch", "triton"), HOSTILE)
    store = RecordStore(tmp_path, "h100.jsonl")
    for m in (64, 128):
        record = recorded("gemm", W8A8, {"m": m, **QKV}, m * 2e-7, process=HOSTILE, environment=texts,
                          tile={HOSTILE: 1, "block_m": 16})  # fmt: skip
        store.append(record)
    assert store.path.read_text().count("window.owned") >= 2 * 8
    found = run_study(
        study("qwen3-30b-a3b", ["h100"], ["vllm", "tokenfab+vllm"], ["tp1"], [64, 128], precision="fp8",
              records=tmp_path)
    )  # fmt: skip
    assert any(op.provenance == MEASURED_HERE for point in found.points for op in point.step.ops)
    path = tmp_path / "report.html"
    write_report(path, [found, found], 1.0, 1.0)
    page, errors = opened(browser, path, 1280, 900)
    page.evaluate("Plotly.Fx.hover('throughput-0', [{curveNumber: 1, pointNumber: 0}])")
    page.wait_for_selector("#throughput-0 .hoverlayer .hovertext")
    assert page.evaluate("window.owned") is None
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert errors == []
