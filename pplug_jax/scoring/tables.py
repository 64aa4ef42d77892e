"""Show a table on the terminal, or write it in Markdown."""

from collections.abc import Sequence

from rich.table import Table

from pplug_jax.runtime.console import console
from pplug_jax.runtime.primary import is_primary

Rows = Sequence[Sequence[str]]


def show_table(title: str, header: Sequence[str], rows: Rows) -> None:
    """Print the table; the first column is text, the others are numbers."""
    table = Table(title=title)
    for i, cell in enumerate(header):
        table.add_column(cell, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if is_primary():
        console.print(table)


def markdown(header: Sequence[str], rows: Rows) -> str:
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
