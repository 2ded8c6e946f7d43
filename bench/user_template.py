"""Where a kernel of one's own starts: a working file per op, and the buffers that a call gets, as they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ..kernels.registry import Kernel, Shape, find_kernels
from .user_check import SMALL_SHAPES, buffers_device

FOLDER = Path(__file__).with_name("templates")
TEMPLATE_FORMATS = {
    "gemm": "fp8_block-fp8_group",
    "moe": "bf16-bf16",
    "attention": "bf16-bf16",
    "mla": "bf16-bf16",
    "rope_append": "bf16",
    "mla_append": "bf16",
    "quantize": "fp8_row",
    "rms_norm_quantize": "fp8_row",
    "swiglu_quantize": "fp8_row",
}
"""The format that the file of an op computes; any other starts from the registry's own kernel (``any.py``)."""

_TIMED_SHAPES = {
    "gemm": "m=64,n=7168,k=2048",
    "moe": "num_tokens=64,hidden=2048,inter=768,top_k=8,num_experts=128,ep=1,load=0",
    "attention": "batch=16,length=8192,num_heads=64,num_kv_heads=8,head_dim=128,window=0,q_len=1,page_size=64",
    "mla": "batch=32,length=8192,num_heads=128,kv_lora_rank=512,rope_dim=64,q_len=1,page_size=64",
    "rope_append": "num_tokens=64,num_heads=64,num_kv_heads=8,head_dim=128,page_size=64",
    "mla_append": "num_tokens=64,num_heads=128,kv_lora_rank=512,rope_dim=64,page_size=64",
    "quantize": "rows=64,columns=7168",
    "rms_norm_quantize": "rows=64,columns=7168",
    "swiglu_quantize": "rows=64,columns=2048",
}
"""Real models', to begin with."""

ON_HOST = ("sizes", "window", "origin")
"""Buffers that lie on the host, so that reading them does not wait for the device."""


class BufferRow(NamedTuple):
    """One tensor of a call. ``part``: "weights", "activations" or "output"; ``name``: "" of an output that is one."""

    part: str
    name: str
    dtype: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        where = ", on the host" if self.name in ON_HOST else ""
        return f"{self.name} {self.dtype} ({', '.join(map(str, self.sizes))}{where})".strip()


def buffers_of(kernel: Kernel, shape: Shape) -> list[BufferRow]:
    """As the registry's kernel gets them: made on the CPU, attention's with its plan on the GPU where there is one."""
    device = buffers_device() if kernel.op in ("attention", "mla") else "cpu"
    run = kernel.load()
    made: dict[str, Any] = {
        "weights": run.make_weights(shape, 0, device),
        "activations": run.make_activations(shape, 0, device),
        "output": run.make_output(shape, device),
    }
    return [
        BufferRow(part, name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for part, buffers in made.items()
        for name, tensor in (buffers if isinstance(buffers, dict) else {"": buffers}).items()
    ]


def buffers_document(op: str) -> str:
    """Markdown: every format of ``op`` with its buffers at the op's first small shape."""
    shape = SMALL_SHAPES[op][0]
    lines = [f"### {op}", "", f"At {_words(shape)}.", ""]
    lines += ["| format | weights | activations | output |", "|---|---|---|---|"]
    for kernel in find_kernels(op):
        rows = buffers_of(kernel, shape)
        cells = [
            "; ".join(str(row) for row in rows if row.part == part) for part in ("weights", "activations", "output")
        ]
        lines.append(f"| {kernel.format} | {' | '.join(cell or '-' for cell in cells)} |")
    return "\n".join(lines)


def template(op: str | None, formats: list[str] | None) -> str:
    """The text of a file that computes ``op`` in one format, ready for ``--kernel``.

    Raises:
        ValueError: no op or an unknown one, or formats that name none or several of its rows.
    """
    from .user_kernel import base_kernel

    if op not in TEMPLATE_FORMATS:
        raise ValueError(f"op: expected one of {', '.join(TEMPLATE_FORMATS)}; got {op or 'none'}")
    kernel = base_kernel(op, formats or [TEMPLATE_FORMATS[op]])
    is_own = kernel.format == TEMPLATE_FORMATS[op]
    body = (FOLDER / f"{op if is_own else 'any'}.py").read_text()
    if not is_own:
        body = body.replace('"OP"', f'"{op}"').replace('"FORMAT"', f'"{kernel.format}"')
    shape = SMALL_SHAPES[op][0]
    head = [
        f"right?  tokenfab bench {op} --format {kernel.format} --kernel THIS_FILE.py:my_kernel --check",
        f"fast?   tokenfab bench {op} --format {kernel.format} --kernel THIS_FILE.py:my_kernel --quick \\",
        f"          --shape {_TIMED_SHAPES[op]}",
        f"What a call gets at {_words(shape)} (docs/own_kernel.md):",
        *(f"  {row.part}: {row}" for row in buffers_of(kernel, shape)),
    ]
    return "".join(f"# {line}\n" for line in head) + body


def _words(shape: Shape) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items())
