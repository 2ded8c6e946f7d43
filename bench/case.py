"""One kernel at one shape: its buffers, and the check that its output is right.

What the check is made against: outputs kept from an earlier call (every call writes onto poison, and inputs
change in the end), a reference read from memory (it is computed after the launch), NaN in the reference (an
error must be a finite number), a kernel that is right only at first (the timed graphs' own outputs are
checked after timing), inputs used as scratch (checksums).

Units: bytes per call, seconds. Errors: ``ValueError`` where a case contradicts itself; a wrong output is no
error but a reason in ``Check.problems``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from .device import Device, Graph
from .measurement import Check

_SEED_STRIDE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one shape: how to make its buffers, launch it, and judge it.

    Buffers are tensors, or tuples, lists or dicts of such; None for no weights. The kernel reads ``weights``
    (KV cache included) and ``activations`` and writes all of ``output``; none of the three overlap.

    Attributes:
        launch: ``launch(weights, activations, output)`` enqueues the kernel on the current stream. Capturable:
            no host sync, no launch that depends on data.
        make_weights, make_activations: ``make(seed)`` gives fresh buffers of realistic random data.
        make_output: ``make()`` gives a fresh output.
        refresh: ``refresh(activations, seed)`` puts other data into the same buffers.
        error: ``error(weights, activations, output)`` computes the reference anew and gives the distance to it;
            it may raise ``AssertionError`` instead.
        tolerance: the greatest error of a correct kernel.
        checksum: ``checksum(buffers)`` gives a value that changes when any byte does.
        weight_bytes, activation_bytes: what one call must move at least; activations include the output.
        flops, compute_floor_s: of one call; flops / matrix peak, 0 without a matrix multiply.
        memory_bytes_per_s: the GPU's peak bandwidth.
    """

    launch: Callable[[Any, Any, Any], None]
    make_weights: Callable[[int], Any]
    make_activations: Callable[[int], Any]
    make_output: Callable[[], Any]
    refresh: Callable[[Any, int], None]
    error: Callable[[Any, Any, Any], float]
    tolerance: float
    checksum: Callable[[Any], Hashable]
    weight_bytes: int
    activation_bytes: int
    flops: float
    compute_floor_s: float
    memory_bytes_per_s: float


@dataclass(frozen=True)
class Anchor:
    """A kernel timed beside each block, so that ratios can be compared where clocks differ: a copy, a vendor matmul.

    ``launch`` takes nothing; its buffers are its own.
    """

    name: str
    launch: Callable[[], None]


class BufferSet(NamedTuple):
    """What one call gets."""

    weights: Any
    activations: Any
    output: Any


# -- buffers ---------------------------------------------------------------------------------------


def make_sets(case: Case, device: Device, l2_policy: str, num_sets: int, seed: int) -> list[BufferSet]:
    """The ring: weights of their own per set under ``cold_weights``, everything under ``cold_all``."""
    seeds = [seed * _SEED_STRIDE + index for index in range(num_sets)]
    weights = [case.make_weights(s) for s in seeds]
    own = num_sets if l2_policy == "cold_all" else 1
    activations = [case.make_activations(s) for s in seeds[:own]]
    outputs = [case.make_output() for _ in range(own)]
    _check_regions(device, "weights", weights, case.weight_bytes)
    _check_regions(
        device, "activations and output", list(zip(activations, outputs, strict=True)), case.activation_bytes
    )
    _check_disjoint(device, [*weights, *activations, *outputs])
    for name, buffers in (("weights", weights[0]), ("activations", activations[0])):
        if device.regions(buffers) and device.all_zero(buffers):
            raise ValueError(f"make_{name}: expected realistic data; got zeros, which draw less power")
    return [BufferSet(weights[i], activations[i % own], outputs[i % own]) for i in range(num_sets)]


def _check_regions(device: Device, name: str, sets: Sequence[Any], claimed_bytes: int) -> None:
    for buffers in sets:
        held = sum(num_bytes for _, num_bytes in device.regions(buffers))
        if held < claimed_bytes:
            raise ValueError(f"{name}: expected buffers of at least the {claimed_bytes} bytes claimed; got {held}")


def _check_disjoint(device: Device, buffers: Sequence[Any]) -> None:
    """Buffers that share memory would stay in L2 however many of them rotate."""
    regions = sorted((*region, owner) for owner, part in enumerate(buffers) for region in device.regions(part))
    end, last = 0, -1
    for start, num_bytes, owner in regions:
        if start < end and owner != last:
            raise ValueError(f"make_*: expected buffers of their own at each call; got two that share address {start}")
        if start + num_bytes > end:
            end, last = start + num_bytes, owner


# -- correctness -----------------------------------------------------------------------------------


class Checker:
    """The case's output against its reference, before and after timing."""

    def __init__(self, case: Case, device: Device, sets: list[BufferSet], seed: int) -> None:
        self._case, self._device, self._sets, self._seed = case, device, sets, seed
        self._activations = _distinct([s.activations for s in sets])
        self._outputs = _distinct([s.output for s in sets])
        self._checksums = self._checksum()
        self._problems: list[str] = []

    def calls(self, num_calls: int) -> list[Callable[[], None]]:
        """``num_calls`` launches that go round the ring."""
        launches = [partial(self._case.launch, *buffers) for buffers in self._sets]
        return [launches[index % len(launches)] for index in range(num_calls)]

    def _checksum(self) -> list[Hashable]:
        inputs = [*(s.weights for s in self._sets), *self._activations]
        return [self._case.checksum(buffers) for buffers in inputs if self._device.regions(buffers)]

    def _error(self, buffers: BufferSet, when: str) -> float | None:
        """The error against a reference computed now, after the launch, so that the launch could not read it."""
        if not self._device.all_finite(buffers.output):
            self._problems.append(f"{when}: the output is not finite, or not all written")
            return None
        try:
            error = float(self._case.error(*buffers))
        except AssertionError as raised:
            self._problems.append(f"{when}: {raised}")
            return None
        if not 0 <= error < math.inf:
            self._problems.append(f"{when}: expected a finite error >= 0; got {error}")
            return None
        if error > self._case.tolerance:
            self._problems.append(f"{when}: error {error:.4g}, more than the tolerance {self._case.tolerance:.4g}")
        return error

    def before(self) -> Check:
        """Each set once and the first again, each call onto a poisoned output: a call that is skipped, because its
        inputs were seen before or for any other reason, leaves the poison behind. Then a graph of the same calls."""
        errors = []
        for index, call in enumerate(self.calls(len(self._sets) + 1)):
            buffers, when = self._sets[index % len(self._sets)], f"before timing, call {index}"
            self._device.poison(buffers.output)
            call()
            self._device.synchronize()
            if index in (0, len(self._sets) - 1, len(self._sets)):
                errors.append(self._error(buffers, when))
            elif not self._device.all_finite(buffers.output):
                self._problems.append(f"{when}: the output is not finite, or not all written")
            if self._problems:
                break
        else:
            errors.append(self._replay(self._device.capture(self.calls(len(self._sets))), "captured"))
        return self._check(before_error=_worst(errors))

    def after(self, before: Check, graphs: Sequence[Graph]) -> Check:
        """The timed graphs' own outputs; the inputs; then the first graph again on new activations."""
        after_error = _worst([self._replay(graph, "after timing") for graph in graphs])
        if self._checksum() != self._checksums:
            self._problems.append("inputs changed: the kernel wrote to its inputs")
        unrefreshed = self._case.checksum(self._activations[-1])
        for index, activations in enumerate(self._activations):
            self._case.refresh(activations, (self._seed + 1) * _SEED_STRIDE - 1 - index)
        if self._case.checksum(self._activations[-1]) == unrefreshed:
            raise ValueError("refresh: expected other data in the activations; got the same checksum")
        refreshed_error = self._replay(graphs[0], "on new inputs")
        return self._check(before.before_error, after_error, refreshed_error)

    def _replay(self, graph: Graph, when: str) -> float | None:
        for output in self._outputs:
            self._device.poison(output)
        graph.launch()
        self._device.synchronize()
        if not all(self._device.all_finite(output) for output in self._outputs):
            self._problems.append(f"{when}: an output is not finite, or not all written")
            return None
        # outputs that are not the last call's own hold another set's result
        own = [self._sets[-1]] if len(self._outputs) == 1 else [self._sets[0], self._sets[-1]]
        return _worst([self._error(buffers, when) for buffers in own])

    def _check(
        self, before_error: float | None, after_error: float | None = None, refreshed_error: float | None = None
    ) -> Check:
        return Check(
            tolerance=self._case.tolerance,
            before_error=before_error,
            after_error=after_error,
            refreshed_error=refreshed_error,
            problems=tuple(self._problems),
        )


def _distinct(buffers: Sequence[Any]) -> list[Any]:
    return list({id(part): part for part in buffers}.values())


def _worst(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return max(known) if known and len(known) == len(errors) else None
