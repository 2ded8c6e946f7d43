"""The cluster: Ray places each point on a CPU or a GPU somewhere. The only module that imports ray.

A point for a CPU is a task with one CPU; Ray begins it again where its worker or node died, ``ATTEMPTS`` times in all.
A GPU is held by an actor with one GPU and one CPU, pinned to a GPU model by the node's label of Ray's
(``accelerator_type``) or by a resource of its own (``gpu_model:h100``), and never restarted: who drives it asks for
another. Answers are small and travel with the message that they are done, so none is lost with a node.

What Ray prints goes to standard error while a cluster is in use: standard output belongs to the command.

Errors: ``FleetError`` where ray is not installed, no cluster answers, or none of its nodes has what is asked for.

Source: Ray 2.60 documentation, "Fault tolerance" (max_retries counts workers and nodes that died, not exceptions).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .fleet import ACCELERATOR_TYPES, ATTEMPTS, GPU_RESOURCE, FleetError, Job, Lost, SeatDied

INSTALL_HINT = "pip install 'tokenfab[ray]', in a checkout pip install '.[ray]'"
PLACE_S, RENEW_S, MOMENT_S = 120.0, 30.0, 2.0
"""How long a GPU that the cluster has may take to be given to us: at first; in place of one that is lost; and where
it is most likely in use. One that others use takes longer."""

SEAT_CPUS = 1
_ACCELERATOR = "accelerator_type:"


def _ray() -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise FleetError(f"ray: expected it installed; {INSTALL_HINT}") from None
    return ray


@contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """The cluster at ``address``; "auto": the one of RAY_ADDRESS, or that runs on this machine. Left at the end.

    Raises:
        FleetError: as the module says.
    """
    ray = _ray()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            why = (str(error).splitlines() or [""])[0]
            raise FleetError(
                f"ray: expected a cluster at {address!r} (`ray start --head` starts one here); {why}"
            ) from None
        try:
            yield Cluster(ray)
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class _Label:
    """How a node names its GPUs: a row of ``gpus``, and the resource or accelerator type that an actor asks for."""

    gpu: str
    resource: str = ""
    accelerator_type: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Of an actor that must get to such a node."""
        return {"resources": {self.resource: 1}} if self.resource else {"accelerator_type": self.accelerator_type}


class Cluster:
    """A connection to Ray."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def num_cpus(self) -> int:
        return int(sum(node.get("CPU", 0) for node in self._nodes()))

    def num_nodes(self) -> int:
        return len(self._nodes())

    # -- CPUs --------------------------------------------------------------------------------------

    def spread(self, function: str, jobs: Sequence[Job]) -> Generator[tuple[Job, Any], None, None]:
        """As ``Spread``. What ``function`` raises is raised here, and the other jobs are given up."""
        ray = self._ray
        if self.num_cpus() < 1:
            raise FleetError("ray: expected a node with a CPU; the cluster has none")
        task = ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1, retry_exceptions=False)(call)
        job_of = {task.options(name=job.what).remote(function, job.payload): job for job in jobs}
        try:
            while job_of:
                ready, _ = ray.wait(list(job_of), num_returns=1)
                for each in ready:
                    job = job_of.pop(each)
                    try:
                        answer = self._get(each)
                    except SeatDied as error:
                        answer = Lost(f"died: {ATTEMPTS} workers ended at it: {error}")
                    yield job, answer
        finally:
            for each in job_of:
                ray.cancel(each, force=True)

    def _get(self, reference: Any, timeout_s: float | None = None) -> Any:
        """A result; ``SeatDied`` where its process is gone; else what it raised."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference, timeout=timeout_s)
        except errors.GetTimeoutError:
            raise SeatDied(f"no answer within {timeout_s:.0f} s") from None
        except errors.RayTaskError as error:
            _check_import(error.cause)
            raise (error.cause if isinstance(error.cause, Exception) else RuntimeError(_last(error))) from None
        except errors.RayError as error:
            _check_import(error)
            raise SeatDied(f"{type(error).__name__}: {_last(error)}") from None

    # -- GPUs --------------------------------------------------------------------------------------

    def gpu_models(self) -> dict[str, int]:
        """Rows of ``gpus`` that the nodes name, and how many GPUs of each; nodes that name none count as "unknown"."""
        found: dict[str, int] = {}
        for node in self._nodes():
            if node.get("GPU", 0) >= 1:
                label = _label(node)
                model = "unknown" if label is None else label.gpu
                found[model] = found.get(model, 0) + int(node["GPU"])
        return found

    def seats(
        self, gpu: str, actor: str, *arguments: Any, most: int | None = None, expected: int | None = None
    ) -> list[RaySeat]:
        """An actor ("module:Class", made with ``arguments``) on every GPU of a model that is free, or on ``most``.

        ``expected``: how many surely are; the others are waited for only a moment.

        Raises:
            FleetError: no node has such a GPU.
        """
        kinds = self._kinds(gpu)
        if not kinds:
            got = ", ".join(f"{count} {name}" for name, count in self.gpu_models().items()) or "no GPU"
            raise FleetError(
                f"gpu: expected a node with {gpu} (and {SEAT_CPUS} CPU per GPU); the cluster has {got}. "
                f"ray start --resources '{{\"{GPU_RESOURCE}{gpu}\": 8}}' says so where Ray's label does not"
            )
        module, _, name = actor.partition(":")
        remote = self._ray.remote(max_restarts=0, max_task_retries=0)(getattr(importlib.import_module(module), name))
        made: list[Any] = []
        for label, fits in kinds.items():
            options = {"num_gpus": 1, "num_cpus": SEAT_CPUS, **label.options}
            count = fits if most is None else min(fits, most - len(made))
            made += [remote.options(**options).remote(*arguments) for _ in range(count)]
        placed = {each.node.remote(): each for each in made}
        if expected is not None:
            self._ray.wait(list(placed), num_returns=max(1, min(expected, len(placed))), timeout=PLACE_S)
        wait_s = MOMENT_S if expected is not None else RENEW_S if most is not None else PLACE_S
        ready, late = self._ray.wait(list(placed), num_returns=len(placed), timeout=wait_s)
        for each in late:  # others use that GPU
            self._ray.kill(placed[each])
        return [RaySeat(self, placed[each]) for each in ready]

    def _kinds(self, gpu: str) -> dict[_Label, int]:
        """Each way in which nodes name this model, and how many actors fit on those nodes."""
        counts: dict[_Label, int] = {}
        for node in self._nodes():
            label = _label(node)
            fits = int(min(node.get("GPU", 0), node.get("CPU", 0) // SEAT_CPUS))
            if label is not None and label.gpu == gpu and fits:
                counts[label] = counts.get(label, 0) + fits
        return counts


def _label(node: dict[str, float]) -> _Label | None:
    """A node's own word for its GPUs, else Ray's; None where neither names a row of ``gpus``."""
    for name, count in node.items():
        if name.startswith(GPU_RESOURCE) and count >= 1:
            return _Label(name.removeprefix(GPU_RESOURCE), resource=name)
    for name in node:
        label = name.removeprefix(_ACCELERATOR)
        if name.startswith(_ACCELERATOR) and label in ACCELERATOR_TYPES:
            return _Label(ACCELERATOR_TYPES[label], accelerator_type=label)
    return None


def _check_import(error: BaseException) -> None:
    if "No module named" in str(error):
        raise FleetError(f"ray: expected tokenfab and what it needs on every node; {_last(error)}") from None


def _last(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


class RaySeat:
    """An actor that holds one GPU."""

    def __init__(self, cluster: Cluster, actor: Any) -> None:
        self._cluster, self._actor = cluster, actor

    def call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """What the method gives, or raises.

        Raises:
            SeatDied: the process or its node is gone, or did not answer in time; it is ended.
        """
        try:
            return self._cluster._get(getattr(self._actor, method).remote(*arguments), timeout_s)
        except SeatDied:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process; Ray has its GPU back."""
        with contextlib.suppress(Exception):  # gone already
            self._cluster._ray.kill(self._actor)


# -- on a node -------------------------------------------------------------------------------------


def call(function: str, payload: Any) -> Any:
    """The function named, on the worker."""
    module, _, name = function.partition(":")
    found: Callable[[Any], Any] = getattr(importlib.import_module(module), name)
    return found(payload)
