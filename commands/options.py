"""Options that several commands take: the GPU, stacks, data, and one deployment of a model."""

from __future__ import annotations

import click

from .shared import combined, comma, path_type

gpu_option = click.option("--gpu", required=True, help="See `tokenfab gpus`.")
stack_option = click.option(
    "--stack", default="vllm", show_default=True, help="vllm, sglang, trtllm; NAME@VERSION for an older one."
)
stacks_option = comma(
    "--stack", "stacks", "NAME@VERSION for an older one.", default="vllm,sglang,trtllm", show_default=True
)
parallel_option = click.option(
    "--parallel", help="tp8, dp8-ep8, tp2-dp4-ep8, dp8-ep8-ag, ...; by default the fewest GPUs, DP and EP."
)
batch_option = click.option("--batch", type=float, default=32, show_default=True, help="Sequences per GPU.")
records_option = click.option(
    "--records", type=path_type, metavar="DIR",
    help="Records of the stack tokenfab (or tokenfab+vllm: vllm's rows for the rest), not the package's.",
)  # fmt: skip
report_option = click.option(
    "--report", type=path_type, metavar="FILE", help="Write an HTML report that works offline."
)
data_option = click.option(
    "--published-data", type=path_type, metavar="DIR", help="Tables from this aiconfigurator checkout, not the package."
)
_precision_options = combined(
    click.option("--precision", help="See `tokenfab models --precisions`; the checkpoint's own by default."),
    click.option("--kv-format", help="Format of the KV cache, instead of the precision's: bf16 or fp8."),
)
_step_options = combined(
    click.option(
        "--load", default="balanced", show_default=True, help="Expert load: balanced, power_law_1.01 or power_law_1.2."
    ),
    click.option(
        "--tokens-per-step", type=int, default=1, show_default=True, help="New tokens per sequence: 1 + drafts."
    ),
    click.option("--kept-tokens", type=float, default=1.0, show_default=True, help="Of those kept: acceptance length."),
)
model_options = combined(
    _precision_options,
    click.option("--context", type=int, default=4096, show_default=True, help="Cached tokens per sequence."),
    _step_options,
)
request_options = combined(_precision_options, _step_options)
"""Those of ``model_options`` but for the context, which is that of a request."""
