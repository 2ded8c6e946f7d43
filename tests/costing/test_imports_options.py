"""What a result does not say is asked for, what contradicts it is refused; names of models, GPUs and precisions."""

from __future__ import annotations

from typing import Any

import pytest
from tokenfab.costing.imports import names
from tokenfab.costing.imports.read import read_results
from tokenfab.costing.imports.served import Given, Served, completed_by
from tokenfab.costing.sweep import Parallel
from tokenfab.tests.costing.imports_files import DATA


def read(name: str, index: int = 0) -> Served:
    return read_results(DATA / name)[index]


def fields_of(served: Served, *wanted: str) -> tuple[Any, ...]:
    return tuple(getattr(served, name) for name in wanted)


def test_what_nobody_says_is_asked_for() -> None:
    served = read("vllm_serve.json")
    said: dict[str, Any] = {}
    for option, value in (("gpu", "h200"), ("num_gpus", 8), ("precision", "fp8"), ("parallel", Parallel.parse("tp8"))):
        with pytest.raises(ValueError, match=f"{option}: the file does not say; give --{option.replace('_', '-')}"):
            completed_by(served, Given(**said))
        said[option] = value
    whole = completed_by(served, Given(**said))
    assert fields_of(whole, *said) == tuple(said.values())
    assert completed_by(served, Given(gpu="h200", num_gpus=8), kernels=False).precision is None


@pytest.mark.parametrize(
    ("name", "index", "given", "field"),
    [
        ("trtllm_bench.json", 0, Given(gpu="h100"), "gpu"),
        ("trtllm_bench.json", 0, Given(num_gpus=2), "num_gpus"),
        ("trtllm_bench.json", 0, Given(precision="nvfp4"), "precision"),
        ("trtllm_bench.json", 0, Given(kv_format="bf16"), "kv_format"),
        ("trtllm_bench.json", 0, Given(model="gpt-oss-20b"), "model"),
        ("sglang.jsonl", 0, Given(gpu="h100", parallel=Parallel(1, 4, 4)), "parallel"),
        ("vllm_append.jsonl", 0, Given(model="deepseek-r1", kept_tokens=1.5), "kept_tokens"),
        ("vllm_append.jsonl", 0, Given(model="deepseek-r1", tokens_per_step=4), "tokens_per_step"),
        ("inferencex_agg_bmk.json", 1, Given(prefill_gpus=8), "prefill_gpus"),
        ("inferencex_agg_bmk.json", 1, Given(prefill_parallel=Parallel(4)), "prefill_parallel"),
        ("inferencex_agg_bmk.json", 0, Given(prefill_gpus=4), "prefill_gpus"),
        ("inferencex_agg_bmk.json", 0, Given(precision="nvfp4"), "precision"),
        ("inferencex_agg_bmk.json", 0, Given(model="deepseek-v3"), "model"),
    ],
)
def test_file_and_option_in_conflict(name: str, index: int, given: Given, field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}: the file says .*; --{field.replace('_', '-')} says"):
        completed_by(read(name, index), given)


def test_options_that_agree_or_refine_are_no_conflict() -> None:
    row = read("inferencex_agg_bmk.json")
    assert completed_by(row, Given(gpu="H200_SXM", num_gpus=8, model="deepseek-r1")).gpu == "h200"
    assert completed_by(row, Given(precision="fp8_tensor")).precision == "fp8_tensor"
    spread_out = completed_by(read("inferencex_agg_bmk.json", 1), Given(parallel=Parallel.parse("dp8-ep8-ag")))
    assert spread_out.parallel == Parallel(1, 8, 8, all_gather=True)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"num_gpus": 0}, "num_gpus"),
        ({"num_gpus": 8, "prefill_gpus": 8}, "prefill_gpus"),
        ({"num_gpus": 8, "prefill_gpus": -1}, "prefill_gpus"),
        ({"num_gpus": 12, "parallel": Parallel(8)}, "parallel"),
        ({"num_gpus": 12, "prefill_gpus": 4, "parallel": Parallel(8), "prefill_parallel": Parallel(8)},
         "prefill_parallel"),
        ({"num_gpus": 8, "prefill_parallel": Parallel(8)}, "prefill_gpus"),
        ({"gpu": "h2000"}, "gpu"),
        ({"model": "deepseek-r9"}, "model"),
        ({"precision": "fp7"}, "precision"),
        ({"tokens_per_step": 0}, "tokens_per_step"),
        ({"kept_tokens": 0.9}, "kept_tokens"),
        ({"kept_tokens": float("nan")}, "kept_tokens"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(given: dict[str, Any], field: str) -> None:
    whole = {"gpu": "h200", "num_gpus": 8, "precision": "fp8", "parallel": Parallel(4), **given}
    with pytest.raises(ValueError, match=field):
        completed_by(read("vllm_serve.json"), Given(**whole))


def test_names_are_exact() -> None:
    assert names.model("deepseek-ai/DeepSeek-R1-0528") == "deepseek-r1"
    assert names.model("/mnt/models/DeepSeek-R1/") == "deepseek-r1"
    assert names.model("deepseek-ai/DeepSeek-R1-Distill-Llama-70B") is None
    assert names.model("meta-llama/Llama-4-Scout-17B-16E-Instruct") is None
    runners = {
        "h200": "h200", "h200-nb_1": "h200", "b200-dgxc_03": "b200", "cluster:gb300-nv": "gb300", "gb200": "gb200",
        "mi355x-disagg": "mi355x", "rtx6000pro-lat": "rtx_pro_6000", "h2000": None, "": None,
    }  # fmt: skip
    assert {label: names.gpu_of_runner(label) for label in runners} == runners
    assert names.gpu_of_device("NVIDIA H100 80GB HBM3") == "h100"
    assert names.gpu_of_device("NVIDIA H100") is None
    assert names.stack("dynamo-trt") == "trtllm"
    assert names.stack("atom") is None


@pytest.mark.parametrize(
    ("word", "native", "expected"),
    [
        ("fp8", "fp8", "fp8"), ("fp8", "bf16", "fp8"), ("fp4", "mxfp4", "mxfp4"), ("fp4", "fp8", "nvfp4"),
        ("NVFP4", "fp8", "nvfp4"), ("FP8", "fp8", "fp8_tensor"), ("FP8_BLOCK_SCALES", "fp8", "fp8"),
        ("NO_QUANT bfloat16", "fp8", "bf16"), ("W4A16_MXFP4", "mxfp4", "mxfp4"), ("bf16", "fp8", "bf16"),
    ],
)  # fmt: skip
def test_a_word_for_a_precision(word: str, native: str, expected: str) -> None:
    assert names.one_precision(word, native) == expected


@pytest.mark.parametrize("word", ["int4", "awq", "NO_QUANT float16", "W4A16_AWQ"])
def test_a_precision_that_is_none_of_ours(word: str) -> None:
    with pytest.raises(ValueError, match=word):
        names.one_precision(word, "fp8")
