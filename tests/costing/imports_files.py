"""The files of ``tests/data/imports``, read plainly, changed, and written again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data" / "imports"


def documents(name: str) -> list[Any]:
    """The JSON documents of a file: a list's items, the lines, or the one."""
    text = (DATA / name).read_text()
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    whole = json.loads(text)
    return whole if isinstance(whole, list) else [whole]


def changed(name: str, change: Callable[[Any], None], index: int = 0) -> Any:
    """A copy of one document with a change."""
    document = copy.deepcopy(documents(name)[index])
    change(document)
    return document


def set_at(document: Any, field: str, value: Any) -> None:
    """``a.b.c`` of a document set; removed for ``...``."""
    *path, last = field.split("/")
    for part in path:
        document = document[part]
    if value is ...:
        del document[last]
    else:
        document[last] = value


def write(path: Path, *found: Any) -> Path:
    """One document, or several as lines."""
    path.write_text("\n".join(json.dumps(document) for document in found) + "\n")
    return path
