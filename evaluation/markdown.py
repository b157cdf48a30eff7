"""Tables of the model card and of reports."""


def markdown_table(header, rows):
    """The header and rows of cells, all text, as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def _escaped(cell):
    return " ".join(cell.split()).replace("|", r"\|")
