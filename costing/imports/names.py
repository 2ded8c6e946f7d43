"""Names that benchmark files use for models, GPUs, precisions and servers: exact tables, never substrings.

Sources: model cards' own names; NVML's device names (``bench/gpus.py``); InferenceX's runner labels, model prefixes,
precision and framework keys (SemiAnalysisAI/InferenceX ``configs/`` @843c625, InferenceX-app ``normalizers.ts``,
``framework-aliases.ts`` @77ca49a); TensorRT-LLM's ``QuantAlgo`` (``tensorrt_llm/quantization/mode.py``).
"""

from __future__ import annotations

import re
from pathlib import Path

from ...bench.deployment import PRECISIONS
from ...bench.gpus import DEVICE_NAMES, GPUS, get_gpu
from ...bench.models import shipped_models

_MODELS: dict[str, tuple[str, ...]] = {
    "deepseek-r1": (
        "deepseek-r1", "deepseek-r1-0528", "deepseek-r1-0528-fp4", "deepseek-r1-0528-fp4-v2",
        "deepseek-r1-0528-nvfp4-v2", "deepseek-r1-fp4",
    ),
    "deepseek-v3": ("deepseek-v3", "deepseek-v3-0324", "deepseek-v3.1"),
    "deepseek-v3.2": ("deepseek-v3.2", "deepseek-v3.2-exp"),
    "gpt-oss-120b": ("gpt-oss-120b",),
    "gpt-oss-20b": ("gpt-oss-20b",),
    "qwen3-235b-a22b": (
        "qwen3-235b-a22b", "qwen3-235b-a22b-fp8", "qwen3-235b-a22b-instruct-2507", "qwen3-235b-a22b-instruct-2507-fp8",
        "qwen3-235b-a22b-thinking-2507", "qwen3-235b-a22b-thinking-2507-fp8",
    ),
    "qwen3-30b-a3b": (
        "qwen3-30b-a3b", "qwen3-30b-a3b-fp8", "qwen3-30b-a3b-instruct-2507", "qwen3-30b-a3b-instruct-2507-fp8",
        "qwen3-30b-a3b-thinking-2507", "qwen3-30b-a3b-thinking-2507-fp8",
    ),
    "mixtral-8x7b": ("mixtral-8x7b", "mixtral-8x7b-v0.1", "mixtral-8x7b-instruct-v0.1"),
    "mixtral-8x22b": ("mixtral-8x22b", "mixtral-8x22b-v0.1", "mixtral-8x22b-instruct-v0.1"),
    "llama-4-maverick": (
        "llama-4-maverick", "llama-4-maverick-17b-128e-instruct", "llama-4-maverick-17b-128e-instruct-fp8",
    ),
    "kimi-k2": ("kimi-k2", "kimi-k2-instruct", "kimi-k2-instruct-0905"),
    "glm-4.5": ("glm-4.5", "glm-4.5-fp8", "glm-4.7", "glm-4.7-fp8"),
    "minimax-m2.5": ("minimax-m2.5", "minimax-m2.5-nvfp4"),
}  # fmt: skip
_MODEL_OF = {name: shipped for shipped, names in _MODELS.items() for name in names}
_PREFIXES = {
    "dsr1": "deepseek-r1",
    "gptoss": "gpt-oss-120b",
    "gptoss120b": "gpt-oss-120b",
    "minimaxm2.5": "minimax-m2.5",
}

_RUNNERS = {"rtx6000pro": "rtx_pro_6000"}

_PRECISION_WORDS: dict[str, tuple[str, ...]] = {
    # InferenceX's keys and their aliases; several of tokenfab's precisions answer to one
    "fp8": ("fp8", "fp8_tensor"),
    "fp4": ("nvfp4", "mxfp4", "mxfp4_mxfp8"),
    "int4": (),
    # TensorRT-LLM's algorithms; what is not here is none of tokenfab's precisions
    "FP8_BLOCK_SCALES": ("fp8",),
    "FP8": ("fp8_tensor",),
    "NVFP4": ("nvfp4",),
    "W4A16_MXFP4": ("mxfp4",),
    "W4A8_MXFP4_MXFP8": ("mxfp4_mxfp8",),
    "NO_QUANT bfloat16": ("bf16",),
    # SGLang's quantization arguments
    "modelopt_fp4": ("nvfp4",),
}

_STACKS = {
    "vllm": "vllm", "dynamo-vllm": "vllm", "vllm-disagg": "vllm", "llmd-vllm": "vllm",
    "sglang": "sglang", "dynamo-sglang": "sglang", "sglang-disagg": "sglang", "mori-sglang": "sglang",
    "trt": "trtllm", "trtllm": "trtllm", "dynamo-trt": "trtllm", "dynamo-trtllm": "trtllm",
}  # fmt: skip


def model(name: str) -> str | None:
    """The shipped model that a checkpoint's name (``owner/name`` or a path's last part) is; None for another."""
    return _MODEL_OF.get(name.rstrip("/").rsplit("/", 1)[-1].lower())


def model_of_prefix(prefix: str) -> str | None:
    """The shipped model of an InferenceX model prefix; None for another."""
    return _PREFIXES.get(prefix.lower())


def is_path(name: str) -> bool:
    """Whether a model is named by its ``config.json`` rather than by name."""
    return name.lower() not in shipped_models() and Path(name).exists()


def shipped(name: str) -> str:
    """The shipped model of this name.

    Raises:
        ValueError: no shipped model's name, and no path.
    """
    if name.lower() not in shipped_models():
        raise ValueError(
            f"model: expected one of {', '.join(shipped_models())}, or the path of a config.json; got {name!r}"
        )
    return name.lower()


def gpu(name: str) -> str:
    """tokenfab's name of a GPU that the user named.

    Raises:
        ValueError: unknown.
    """
    return get_gpu(name).name


def known_gpu(name: str) -> str | None:
    """A GPU by tokenfab's name or the driver's; None for any other words."""
    try:
        return gpu(name)
    except ValueError:
        return gpu_of_device(name)


def gpu_of_device(name: str) -> str | None:
    """The GPU of a driver's device name; None where it is not known."""
    return DEVICE_NAMES.get(name)


def gpu_of_runner(label: str) -> str | None:
    """The GPU of an InferenceX runner label: ``h200``, ``b200-dgxc_03``, ``cluster:gb300-nv``; None for another."""
    first = re.split(r"[-_]", label.lower().removeprefix("cluster:"), maxsplit=1)[0]
    return first if first in GPUS else _RUNNERS.get(first)


def precision(name: str) -> str:
    """The precision that the user named.

    Raises:
        ValueError: unknown.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}; got {name!r}")
    return name


def precisions_of(word: str | None) -> tuple[str, ...]:
    """tokenfab's precisions that a file's word can mean; none where it means none of them."""
    if word is None:
        return ()
    if word in _PRECISION_WORDS:
        return _PRECISION_WORDS[word]
    return (word,) if word in PRECISIONS else ()


def one_precision(word: str, native: str | None) -> str:
    """The precision that a word means for a checkpoint whose own is ``native``.

    Among several the checkpoint's own, else the first: FP4 of a checkpoint that is not MXFP4 is NVFP4.

    Raises:
        ValueError: none of tokenfab's.
    """
    found = precisions_of(word)
    if not found:
        raise ValueError(f"precision: {word!r} is none of tokenfab's ({', '.join(PRECISIONS)})")
    return native if native in found else found[0]


def stack(framework: str) -> str | None:
    """The stack of published kernels that a server is built on; None for another."""
    return _STACKS.get(framework.lower())
