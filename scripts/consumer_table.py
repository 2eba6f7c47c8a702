"""What each engine requires of a folder, as ``weighbridge check`` asks it; docs/consumers.md.

python scripts/consumer_table.py            prints the page
python scripts/consumer_table.py --write    writes docs/consumers.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from convert.consumers import CONSUMERS

PAGE = Path(__file__).parent.parent / "docs" / "consumers.md"


def cell(text: str) -> str:
    """``text`` within a table."""
    return text.replace("|", "\\|")


def render() -> str:
    """The page, from the same table that ``check`` and ``plan`` use."""
    lines = [
        "# What each engine requires",
        "",
        "Made by `scripts/consumer_table.py` from `convert/consumers.py`, the table that `weighbridge check DIR --for ENGINE` and",
        "`weighbridge plan` use.",
    ]
    for consumer in CONSUMERS.values():
        lines += ["", f"## {consumer.name} {consumer.version}"]
        for format, rows in consumer.formats.items():
            lines += ["", f"### {format}", "", "| code | wanted | how it is known |", "| --- | --- | --- |"]
            lines += [f"| {row.code} | {cell(row.wanted)} | {cell(row.source)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        PAGE.write_text(render(), encoding="utf-8")
    else:
        print(render())


if __name__ == "__main__":
    main()
