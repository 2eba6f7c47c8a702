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


LONGEST = 2000
"""Characters of a line; names out of a file may be of any length."""


def plain(text: object) -> str:
    """``text`` as one line that a terminal shows and does not obey: what no one can print is escaped, and what is long is cut."""
    line = str(text)
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... ({len(line) - LONGEST} characters) ... {line[-LONGEST // 2 :]}"
    return line if line.isprintable() else "".join(one if one.isprintable() else repr(one)[1:-1] for one in line)


def echo(text: object, err: bool = False) -> None:
    """Print one line, on stdout or stderr."""
    typer.echo(plain(text), err=err)


class Failing(TyperCommand):
    """A command whose Weighbridge errors become one sentence on stderr (or a JSON object) and the class's exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except WeighbridgeError as error:
            if ctx.params.get("json") is True:
                print_json({"error": str(error), "exit_code": error.exit_code})
            else:
                echo(f"{ctx.command_path}: {error}", err=True)
            raise SystemExit(error.exit_code) from None


def print_json(content: Any) -> None:
    """Print ``content`` as JSON on stdout."""
    text = json_module.dumps(content, indent=2, ensure_ascii=False, default=str)
    typer.echo("".join(one if one.isprintable() or one == "\n" else json_module.dumps(one)[1:-1] for one in text))


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
        table.add_row(*map(plain, row))
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = Console(width=160, markup=False, emoji=False, highlight=False)
    console.print(table)
