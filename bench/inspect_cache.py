"""Facts of earlier compilations on disk: nothing is compiled twice, and nothing stale is served."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from .inspect_child import CHILD_ENVIRONMENT, source_path


def cache_folder() -> Path:
    """``TOKENFAB_CACHE``, else tokenfab's folder where the platform keeps caches."""
    if own := os.environ.get("TOKENFAB_CACHE"):
        return Path(own)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tokenfab"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenfab"


def toolchain() -> dict[str, str]:
    """Versions of the installed Triton and its assemblers, without importing it.

    Raises:
        RuntimeError: no Triton.
    """
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise RuntimeError("triton: expected it installed; pip install 'tokenfab[kernels]'")
    found = {"triton": "".join(re.findall(r"^__version__ = '(.*)'", Path(spec.origin).read_text(), re.MULTILINE))}
    for name in ("ptxas", "ptxas-blackwell"):
        override = os.environ.get(f"TRITON_{name.upper().replace('-', '_')}_PATH")
        tool = override or str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)
        with contextlib.suppress(OSError):
            found[name] = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
    return found


def compiler_environment() -> dict[str, str]:
    """This process's variables that decide what a compiler makes, but for those that a child sets itself."""
    prefixes = ("TRITON_", "DISABLE_", "LLVM_", "MLIR_", "NVPTX_", "PTXAS_")
    return {
        name: value for name, value in os.environ.items() if name.startswith(prefixes) and name not in CHILD_ENVIRONMENT
    }


class Cache:
    """Facts of earlier compilations, one file each.

    The file's name is made of all that goes into a compilation except sources; the file lists these with
    their hashes, as the process saw them loaded, and serves only while every one is unchanged.
    """

    def __init__(self, folder: Path, toolchain: dict[str, str]) -> None:
        self.folder = folder
        self._common = {
            "toolchain": toolchain,
            "python": sys.version,
            "environment": compiler_environment(),
        }
        self._hashes: dict[str, str] = {}

    def _path(self, job: dict[str, Any]) -> Path:
        path = source_path(job["module"])
        try:
            spec = None if path else importlib.util.find_spec(job["module"].split(".")[0])
        except ValueError:  # a module without a spec
            spec = None
        place = str(path or (spec and spec.origin))
        key = json.dumps({"job": job, "place": place, **self._common}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def _hash(self, path: str) -> str:
        if path not in self._hashes:
            try:
                self._hashes[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            except OSError:
                self._hashes[path] = "gone"
        return self._hashes[path]

    def get(self, job: dict[str, Any]) -> dict[str, Any] | None:
        try:
            entry = json.loads(self._path(job).read_bytes())
            sources, facts = dict(entry["dependencies"]), dict(entry["facts"])
        except (OSError, ValueError, KeyError, TypeError):  # none, or cut short
            return None
        return facts if all(self._hash(path) == digest for path, digest in sources.items()) else None

    def put(self, job: dict[str, Any], answer: dict[str, Any]) -> None:
        """Keeps facts; failures are asked again, and so is what changed while it compiled.

        A folder that cannot be written is no reason to lose what was compiled: it warns.
        """
        if not answer.get("dependencies"):
            return
        path = self._path(job)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
                json.dump(answer, part)
            os.replace(part.name, path)
        except OSError as error:
            warnings.warn(f"not cached: {error}", stacklevel=2)
