"""``docs/many_gpus.md`` and its job file: every command of ours is one that the command line understands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from tokenfab.__main__ import cli

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "many_gpus.md").read_text()
JOB = yaml.safe_load((DOCS / "workflows" / "ray-sweep.yaml").read_text())


def commands() -> list[str]:
    blocks = re.findall(r"^```\w*\n(.*?)^```", PAGE, re.M | re.S)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.sub(r"\s+#.*| \|\| exit.*|\s*; done$", "", line[line.index("tokenfab ") :]) for line in lines
             if re.search(r"(^|do )tokenfab ", line)]  # fmt: skip
    return [*found, JOB["spec"]["entrypoint"]]


def test_commands_are_found() -> None:
    assert len(commands()) >= 8
    assert {command.split()[1] for command in commands()} >= {"inspect", "tune", "bench", "lab", "cost", "gate"}


@pytest.mark.parametrize("text", commands())
def test_a_command_is_understood(text: str) -> None:
    words = shlex.split(text)[1:]
    command: Any = cli
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    context = command.make_context(command.name, words)
    assert context.params


def test_the_job_asks_for_whole_gpus_of_one_model() -> None:
    cluster = JOB["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 8
    resources = yaml.safe_load(yaml.safe_load(group["rayStartParams"]["resources"]))
    assert resources == {"gpu_model:h100": limits["nvidia.com/gpu"]}
    assert "--gpu h100" in JOB["spec"]["entrypoint"]
    mounts = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert [mount["mountPath"] for mount in mounts] == ["/records"]
    assert "--out /records" in JOB["spec"]["entrypoint"]


def test_sections_and_links() -> None:
    titles = re.findall(r"^## (.+)$", PAGE, re.M)
    assert titles[:3] == ["Sweeps on Ray", "Ray on Kubernetes", "One GPU per process under pytest-benchmark"]
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (DOCS / target).exists(), target
