"""``tokenfab ranks`` without a GPU: what is missing in one line; ``--check`` under torchrun, which prints no speed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenfab.tests.bench.ranks_launch import torchrun

pytestmark = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="of a machine without a GPU")
pytest.importorskip("torch")

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 128, "num_hidden_layers": 1,
    "vocab_size": 64, "max_position_embeddings": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True,
    "intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
}  # fmt: skip


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "TRITON_INTERPRET")}
    command = [sys.executable, "-m", "tokenfab", "ranks", *arguments]
    return subprocess.run(
        command, env=kept | environment, capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = run("deepseek-v3", "--parallel", "dp8-ep8", "--batch", "64")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: GPU: expected an NVIDIA GPU for each rank; found none. Without one, `torchrun --nproc-per-node 2 -m "
        "tokenfab ranks deepseek-v3 --check` says whether it is right"
    ]


def test_without_a_launcher_it_names_one() -> None:
    done = run("deepseek-v3", "--check")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: RANK: expected the environment of a launcher; got none. One line: torchrun --nproc-per-node N -m "
        "tokenfab ranks ..."
    ]


def test_check_under_torchrun(tmp_path: Path) -> None:
    """One document from rank 0 alone, and no time in it."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    ended = torchrun(["tokenfab", "ranks", str(tmp_path), "--parallel", "tp2-ep2", "--precision", "bf16", "--check",
                      "--json"])  # fmt: skip
    assert ended.code == 0, ended.output
    found = json.loads(ended.output[ended.output.index("{") : ended.output.rindex("}") + 1])
    assert found["passed"]
    assert found["problems"] == []
    assert (found["parallel"], found["ranks"], found["backend"]) == ("tp2-ep2", 2, "gloo")
    assert found["communication"] == {"attention_all_reduce": 1, "experts_all_reduce": 1, "logits_all_gather": 1}
    assert found["same_bits"] is None
    assert len(found["worst"]) == 2
    assert not re.search(r"_s\b|per_s|tokens", json.dumps(list(found)))


def test_a_deployment_of_other_ranks_is_an_error_on_all() -> None:
    ended = torchrun(["tokenfab", "ranks", "qwen3-30b-a3b", "--parallel", "dp4-ep4", "--precision", "bf16", "--check"])
    assert ended.code == 1, ended.output
    message = "error: parallel: expected a deployment of 2 GPUs, one for each rank; got dp4-ep4"
    assert message in ended.output
