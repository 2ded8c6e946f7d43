"""What a precision costs in quality: the same tokens decoded one by one in BF16 and in it, from empty caches.

Teacher-forced: both get the given tokens, whatever they would have chosen, so that position t of one is position t of
the other. Of each token's logits, in float64: KL(P || Q) = sum_v P[v] (log P[v] - log Q[v]) in nats, P of BF16 and Q
of the precision; whether both choose the same token. Of the residual stream behind each layer: SQNR = 10 log10(sum
x^2 / sum (x - y)^2) dB over all tokens, x of BF16.

KL is not symmetric, never negative, and near 0 for a good precision; a layer's SQNR contains what all layers before
it added.
Errors: ``ValueError`` naming the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from .deployment import PRECISIONS, Precision
from .step_checkpoint import load_checkpoint
from .step_state import DecodeStep


@dataclass(frozen=True)
class Trace:
    """What a step made of tokens, on the CPU: logits float32 (N, B, vocab), streams float32 (N, layers + 1, B, h)."""

    logits: torch.Tensor
    streams: torch.Tensor


@dataclass(frozen=True)
class StepError:
    """See the module. ``layer_sqnr_db``: behind each layer; infinite where both are the same bits."""

    precision: str
    num_tokens: int
    kl_mean_nats: float
    kl_max_nats: float
    top1_agreement: float
    layer_sqnr_db: tuple[float, ...]


def decode_tokens(step: DecodeStep, tokens: torch.Tensor) -> Trace:
    """Decodes ``tokens`` (B, N) from empty caches, one column per step.

    Raises:
        ValueError: another batch than the step's, more tokens than its capacity, or ids outside of its vocabulary.
    """
    vocab = step.model.config.vocab_size
    good = tokens.dim() == 2 and tokens.dtype == torch.int64 and tokens.shape[0] == step.batch
    good = good and 1 <= tokens.shape[1] <= step.capacity
    if not good:
        expected = f"int64 ({step.batch}, N), N from 1 to {step.capacity}"
        raise ValueError(f"tokens: expected {expected}; got {tokens.dtype} {tuple(tokens.shape)}")
    if not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab):
        raise ValueError(f"tokens: expected ids from 0 to {vocab - 1}; got {int(tokens.min())} to {int(tokens.max())}")
    logits, streams = [], []
    for position in range(tokens.shape[1]):
        step.seek(position)
        step.token_ids.copy_(tokens[:, position])
        kept = step.launch_with_streams()
        logits.append(step.logits.float().cpu())
        streams.append(torch.stack(kept).float().cpu())
    return Trace(torch.stack(logits), torch.stack(streams))


def compare_traces(precision: str, reference: Trace, other: Trace) -> StepError:
    """``other``, in a precision, against ``reference``, in BF16, of the same tokens.

    Raises:
        ValueError: traces of other shapes, or values that are not finite.
    """
    for name, part in (("logits", "logits"), ("streams", "streams")):
        expected, got = getattr(reference, part), getattr(other, part)
        if expected.shape != got.shape:
            raise ValueError(f"{name}: expected {tuple(expected.shape)}; got {tuple(got.shape)}")
        if not bool(expected.isfinite().all() and got.isfinite().all()):
            raise ValueError(f"{name}: expected finite values; got others")
    wanted, found = (torch.log_softmax(trace.logits.double(), dim=-1) for trace in (reference, other))
    kl = (wanted.exp() * (wanted - found)).sum(dim=-1).clamp_min(0)  # below 0 by rounding only
    agreement = (reference.logits.argmax(dim=-1) == other.logits.argmax(dim=-1)).double().mean()
    x, y = (trace.streams[:, 1:].double() for trace in (reference, other))
    signal, noise = x.square().sum(dim=(0, 2, 3)), (x - y).square().sum(dim=(0, 2, 3))
    sqnr = tuple(
        10 * math.log10(s / n) if n else math.inf for s, n in zip(signal.tolist(), noise.tolist(), strict=True)
    )
    return StepError(precision, kl.numel(), float(kl.mean()), float(kl.max()), float(agreement), sqnr)


def checkpoint_error(
    folder: str | Path, precision: Precision, tokens: torch.Tensor, *, device: torch.device | str = "cuda"
) -> StepError:
    """Of a checkpoint in a precision; each is loaded in turn, so that only one is held.

    Args:
        tokens: (B, N) int64: N tokens of B sequences.

    Raises:
        ValueError: as ``load_checkpoint`` and ``decode_tokens``.
    """
    traces = []
    for each in (PRECISIONS["bf16"], precision):
        step = load_checkpoint(folder, each, batch=tokens.shape[0], capacity=tokens.shape[-1], device=device)
        traces.append(decode_tokens(step, tokens.to(device)))
        del step
    return compare_traces(precision.name, traces[0], traces[1])
