"""Tables of the model card and of reports."""


def markdown_table(header, rows):
    """The header and rows of cells, all text, as a Markdown table."""
    return "\n".join(_line(cells) for cells in (header, ["---"] * len(header), *rows))


def _line(cells):
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in map(_escaped, cells))


def _escaped(cell):
    return " ".join(cell.split()).replace("|", r"\|")
