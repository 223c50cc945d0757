"""Tables for a terminal."""


def text_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Returns the lines of a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
