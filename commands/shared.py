"""What the commands share: one-line errors, comma lists, tables or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


class UserError(click.ClickException):
    """One line, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {' '.join(self.message.split())}", err=True)


class Group(click.Group):
    """Turns a ``ValueError`` of any room, and what a device cannot do, into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ValueError as error:
            raise UserError(str(error)) from error
        except RuntimeError as error:
            from ..bench.device import DeviceError

            if isinstance(error, DeviceError):
                raise UserError(str(error)) from error
            raise


class CommaList(click.ParamType):
    """``a,b,c``: a list of texts, or of what ``convert_item`` makes of them."""

    def __init__(self, name: str, convert_item: Callable[[str], Any] = str) -> None:
        self.name, self.convert_item = name, convert_item

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return [self.convert_item(item.strip()) for item in value.split(",") if item.strip()]
        except ValueError as error:
            raise UserError(f"{param.name if param else self.name}: {error}") from None


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, allow_nan=False))


def combined(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def comma(flag: str, name: str, help_text: str, **more: Any) -> Callable[[Any], Any]:
    """An option that takes a comma list."""
    return click.option(
        flag, name, type=CommaList(name, more.pop("item", str)), help=f"Comma list. {help_text}", **more
    )


path_type = click.Path(path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")

price_file_option = click.option("--prices", "price_file", type=path_type, metavar="FILE", help="A price file (TOML).")
price_options = combined(
    click.option("--tier", default="rent_3yr", show_default=True, help="Price tier; see `tokenfab prices`."),
    click.option("--book", help="Price book, e.g. 2026-02; the newest that has the price by default."),
    price_file_option,
    click.option("--usd-per-gpu-hour", type=float, help="This price for every GPU, instead of the book's."),
)


def show(
    as_json: bool, data: Callable[[], Any], table: Callable[[], Any], lines: Callable[[], list[str]] = list
) -> None:
    """Print ``data()`` as JSON, or ``table()`` and ``lines()`` for people."""
    if as_json:
        print_json(data())
        return
    from ..bench.tables import console

    out = console()
    out.print(table())
    for line in lines():
        out.print(line, soft_wrap=True)


class Progress:
    """A bar on standard error, where that is a terminal."""

    def __init__(self, title: str, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty())
        self._task, self._title = self._bar.add_task(title, total=None), title

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def update(self, done: int, total: int, what: str) -> None:
        self._bar.update(self._task, completed=done, total=total, description=f"{self._title} {what}")

    def advance(self, total: int, what: str) -> None:
        self._bar.update(self._task, advance=1, total=total, description=f"{self._title} {what}")
