"""A checkpoint in several precisions: what each costs in time, and in quality against BF16.

Quality is that of ``step_error``, on any device that runs the kernels. Time is the whole decode step's, behind the same
tokens, and needs a GPU: without one there is none.

Units: seconds, nats, dB. Errors: ``ValueError`` as ``step_error`` and ``load_checkpoint``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from .deployment import PRECISIONS, Precision
from .device import Device, MethodUnavailable
from .gpus import Gpu
from .measurement import Settings
from .records import RecordStore
from .step_checkpoint import load_checkpoint
from .step_error import StepError, Trace, compare_traces, decode_tokens
from .step_measure import measure_step
from .step_state import DecodeStep

_SEED = 1


@dataclass(frozen=True)
class PrecisionResult:
    """One precision. ``error``: None for BF16, which is what the others are held against.

    ``step_s``: None without a GPU, or where ``reason`` says why there is no time or no result at all.
    """

    precision: str
    num_tokens: int
    error: StepError | None
    step_s: float | None = None
    tokens_per_s_per_gpu: float | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def random_tokens(vocab: int, batch: int, num_tokens: int) -> torch.Tensor:
    """(batch, num_tokens) ids, all alike likely: no text, so that a model is less sure of what comes next."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(vocab, (batch, num_tokens), generator=generator)


def read_tokens(path: Path) -> torch.Tensor:
    """Token ids (B, N) of a JSON file: a list of B lists of N ids.

    Raises:
        ValueError: naming the file.
    """
    try:
        rows = msgspec.json.decode(path.read_bytes(), type=list[list[int]])
    except OSError as error:
        raise ValueError(f"{path}: expected a file of token ids; {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a list of lists of token ids; {error}") from None
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"{path}: expected lists of one length, of at least one id; got {[len(row) for row in rows]}")
    return torch.tensor(rows, dtype=torch.int64)


def compare_precisions(
    folder: Path, precisions: Sequence[Precision], tokens: torch.Tensor, place: str, *,
    device: Device | None = None, gpu: Gpu | None = None, store: RecordStore | None = None,
    settings: Settings | None = None, done: Callable[[PrecisionResult], None] = lambda result: None,
) -> list[PrecisionResult]:  # fmt: skip
    """BF16 first, then each of ``precisions``; only one is held at a time.

    Args:
        tokens: (B, N) int64. place: torch's device for buffers.
        device, gpu: to time steps on; None: no times.

    Raises:
        ValueError: the checkpoint or the tokens do not do in BF16. A precision that the model or GPU has no kernels
            for is no error but a reason.
    """
    reference: Trace | None = None
    found = []
    for precision in (PRECISIONS["bf16"], *(each for each in precisions if each.name != "bf16")):
        try:
            step = load_checkpoint(
                folder, precision, batch=tokens.shape[0], capacity=tokens.shape[-1] + 1, device=place
            )
        except ValueError as error:
            if reference is None:
                raise
            found.append(PrecisionResult(precision.name, tokens.numel(), None, reason=str(error)))
            done(found[-1])
            continue
        trace = decode_tokens(step, tokens.to(place))
        error = None if reference is None else compare_traces(precision.name, reference, trace)
        reference = reference or trace
        found.append(_timed(PrecisionResult(precision.name, tokens.numel(), error), step, device, gpu, store, settings))
        del step
        done(found[-1])
    return found


def _timed(
    result: PrecisionResult, step: DecodeStep, device: Device | None, gpu: Gpu | None, store: RecordStore | None,
    settings: Settings | None,
) -> PrecisionResult:  # fmt: skip
    """The same with the time of the step behind the tokens that are cached."""
    if device is None or gpu is None:
        return result
    step.seek(result.num_tokens // step.batch)
    try:
        measured = measure_step(step, device, gpu, store=store, settings=settings, has_ops=False)
    except (ValueError, MethodUnavailable) as error:
        return PrecisionResult(result.precision, result.num_tokens, result.error, reason=str(error))
    reason = measured.record.invalid[0] if measured.record.invalid else ""
    return PrecisionResult(
        result.precision, result.num_tokens, result.error, measured.whole_s, measured.tokens_per_s_per_gpu, reason
    )
