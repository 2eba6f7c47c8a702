"""What the commands share on the way to the terminal: errors as one line, tables, JSON, sizes, a progress bar."""

from __future__ import annotations

import contextlib
import json as json_module
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer
from typer.core import TyperCommand

from formats.errors import UsageError, WeighbridgeError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


class Failing(TyperCommand):
    """A command whose Weighbridge errors become one sentence on stderr (or a JSON object) and the class's exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except WeighbridgeError as error:
            if ctx.params.get("json") is True:
                print_json({"error": str(error), "exit_code": error.exit_code})
            else:
                typer.echo(f"{ctx.command_path}: {error}", err=True)
            raise SystemExit(error.exit_code) from None


def print_json(content: Any) -> None:
    """Print ``content`` as JSON on stdout."""
    typer.echo(json_module.dumps(content, indent=2, ensure_ascii=False, default=str))


@contextlib.contextmanager
def progress_bar(what: str, total: int | None, quiet: bool = False) -> Iterator[Callable[[int], None] | None]:
    """A rich progress bar on stderr with bytes, rate and time left; None where stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "512MiB", "40000"; UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", text.strip().upper())
    if not match:
        raise UsageError(f"{text!r} is no size; wanted for example 5GB or 512MiB")
    return int(float(match[1]) * UNITS[match[2]])


def gigabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def print_table(title: str, columns: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> None:
    """Print a table on stdout; as wide as it needs where stdout is no terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
