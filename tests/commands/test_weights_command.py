"""``tokenfab lab --weights``: a checkpoint that the test makes, in several precisions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tokenfab.__main__ import cli
from tokenfab.bench import step_precisions
from tokenfab.bench.campaign import gpu_of
from tokenfab.bench.deployment import PRECISIONS
from tokenfab.bench.device import MethodUnavailable
from tokenfab.bench.step_precisions import random_tokens, read_tokens
from tokenfab.tests.bench.conftest import device
from tokenfab.tests.bench.plain_models import GPT_OSS, make_tensors
from tokenfab.tests.bench.test_campaign import VirtualDevice
from tokenfab.tests.bench.test_step_checkpoint import TOKENS, save

__all__ = ["device"]


@pytest.fixture
def folder(tmp_path: Path, device: torch.device) -> Path:
    return save(tmp_path / "tiny", GPT_OSS, make_tensors(GPT_OSS))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["lab", "--weights", *map(str, arguments)])


def test_precisions_stand_beside_each_other(folder: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(TOKENS[:1, :3].tolist()))
    common = (folder, "--batch", "1", "--token-ids", ids)
    result = run(*common, "--precision", "fp8,mxfp4,nvfp4", "--json")
    assert result.exit_code == 0, result.output
    bf16, fp8, mxfp4, nvfp4 = json.loads(result.stdout)
    assert (bf16["precision"], bf16["error"], bf16["step_s"], bf16["usd_per_mtok"]) == ("bf16", None, None, None)
    assert 0 < fp8["error"]["kl_mean_nats"] < mxfp4["error"]["kl_mean_nats"]
    assert fp8["num_tokens"] == 3
    assert nvfp4["error"] is None or nvfp4["error"]["kl_mean_nats"] > fp8["error"]["kl_mean_nats"]
    shown = run(*common, "--precision", "fp8")
    assert f"{fp8['error']['kl_mean_nats']:.4g}" in shown.output
    assert "no times without a GPU; the error on the CPU with Triton" in shown.output
    assert f"token ids of {ids}" in shown.output


def test_random_tokens_are_said_to_be_random(folder: Path) -> None:
    result = run(folder, "--batch", "1", "--tokens", "2", "--precision", "fp8")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "against BF16, 2 tokens" in said
    assert "random token ids; --token-ids FILE for real ones" in said
    assert torch.equal(random_tokens(64, 2, 3), random_tokens(64, 2, 3))
    assert random_tokens(64, 2, 300).unique().numel() > 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "fp7"), "precision: expected one of"),
        (("--token-ids", "none.json"), "none.json: expected a file of token ids"),
        (("--usd-per-gpu-hour", "1", "--prices", "none.toml", "--token-ids", "none.json"), "none.json"),
    ],
)
def test_what_is_not_understood_is_one_line(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(folder, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert run(folder.parent / "none").exit_code == 2


@pytest.mark.parametrize("text", ["[]", "[[]]", "[[1], [1, 2]]", '[["a"]]', "[[1]", "[[1.5]]"])
def test_token_files_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ids.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"ids\.json: expected"):
        read_tokens(path)
    path.write_text("[[1, 2], [3, 4]]")
    assert read_tokens(path).tolist() == [[1, 2], [3, 4]]


def test_steps_are_timed_where_there_is_a_clock(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the tokens that were decoded; what cannot be timed keeps its error and says why."""
    clock: Any = VirtualDevice()
    seen: list[tuple[str, list[int]]] = []

    def measure_step(step: Any, *arguments: Any, **options: Any) -> Any:
        assert options["has_ops"] is False
        seen.append((step.precision.name, list(step.cached)))
        if step.precision.name == "fp8":
            raise MethodUnavailable("too much stays in L2")
        return SimpleNamespace(whole_s=0.5, tokens_per_s_per_gpu=2.0, record=SimpleNamespace(invalid=()))

    monkeypatch.setattr(step_precisions, "measure_step", measure_step)
    found = step_precisions.compare_precisions(
        folder, [PRECISIONS["fp8"], PRECISIONS["bf16"], PRECISIONS["mxfp4"]], TOKENS[:1, :2], "cpu", device=clock,
        gpu=gpu_of(clock.properties),
    )  # fmt: skip
    assert seen == [("bf16", [2]), ("fp8", [2]), ("mxfp4", [2])]
    assert [(each.precision, each.step_s, each.tokens_per_s_per_gpu, each.reason) for each in found] == [
        ("bf16", 0.5, 2.0, ""), ("fp8", None, None, "too much stays in L2"), ("mxfp4", 0.5, 2.0, "")
    ]  # fmt: skip
    assert [each.error is None for each in found] == [True, False, False]
