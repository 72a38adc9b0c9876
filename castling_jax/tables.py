"""Tables as text: aligned columns for a terminal, and Markdown.

Cells are text already: whoever has the numbers chooses their digits and their units.
"""

from collections.abc import Iterable, Sequence

Row = Sequence[str]
GAP = "  "  # between two columns


def aligned(rows: Iterable[Row], align: str = "lr", *, indent: str = GAP, widths: Sequence[int] = ()) -> list[str]:
    """The lines of a table in aligned columns, without spaces at their ends.

    Args:
      rows: the header, if there is one, and the rows; all of them have the same number of cells.
      align: "l" (left) or "r" (right) for each column. The last letter also stands for all columns after it, so "lr"
        puts names to the left and numbers to the right.
      indent: the beginning of each line.
      widths: the smallest width of each column, in characters. They keep rows in line that are printed one by one.
    """
    rows = list(rows)
    columns = list(zip(*rows, strict=True))
    smallest = [*widths, *[0] * (len(columns) - len(widths))]
    fitting = [max(width, *map(len, column)) for width, column in zip(smallest, columns, strict=True)]
    pads = [{"l": str.ljust, "r": str.rjust}[letter] for letter in _letters(align, len(columns))]
    lines = (GAP.join(pad(cell, width) for pad, cell, width in zip(pads, row, fitting, strict=True)) for row in rows)
    return [f"{indent}{line}".rstrip() for line in lines]


def markdown(header: Row, rows: Iterable[Row], align: str = "lr") -> list[str]:
    """The lines of a table in Markdown.

    Args:
      header: the names of the columns.
      rows: the cells below them.
      align: as `aligned` takes it; "l" leaves all columns as the page aligns them.
    """
    rule = ("---:" if letter == "r" else "---" for letter in _letters(align, len(header)))
    return [_markdown_line(header), f"|{'|'.join(rule)}|", *map(_markdown_line, rows)]


def _letters(align: str, columns: int) -> str:
    return align.ljust(columns, align[-1])


def _markdown_line(row: Row) -> str:
    # A name may hold the character that ends a cell.
    cells = (cell.replace("|", r"\|") for cell in row)
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"
