"""What the assembler and ``cuobjdump`` say of a function: registers, spills, warnings. Text in, facts out."""

from __future__ import annotations

import re


def resource_usage(text: str, function: str) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL, ... of ``function``, from ``cuobjdump --dump-resource-usage``.

    Raises:
        ValueError: no such function.
    """
    found = re.search(rf"Function {re.escape(function)}:\s*\n(.*)", text)
    if not found:
        raise ValueError(f"function: expected one in the resource usage; got {function!r}")
    return {name: int(value) for name, value in re.findall(r"([A-Z]+(?:\[\d+\])?):(\d+)", found[1])}


def spills(log: str, function: str) -> tuple[int, int]:
    """Bytes of spill stores and spill loads of ``function`` in the output of ``ptxas -v``.

    Raises:
        ValueError: the log does not say.
    """
    found = re.search(
        rf"Function properties for {re.escape(function)}\s*\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    if not found:
        raise ValueError(f"log: expected the spills of {function!r}; got {log[-200:]!r}")
    return int(found[1]), int(found[2])


def ptxas_warnings(log: str) -> tuple[str, ...]:
    """Warnings and performance notes of ``ptxas -v``, in order, each once."""
    lines = (line.split(":", 1)[-1].strip() for line in log.splitlines() if re.search(r"warning|Potential Perf", line))
    return tuple(dict.fromkeys(lines))
