"""The campaign's table."""

from dataclasses import dataclass, field

HEADER = "| fault | trials | failures | outcome |\n|---|---|---|---|"
SHOWN = 10


@dataclass
class Row:
    """
    A row of the table.

    Attributes:
        name: the fault.
        trials: number of trials.
        failures: a description of each failure.
        note: the outcome.
    """

    name: str
    trials: int = 0
    failures: list[str] = field(default_factory=list)
    note: str = ""

    def fail(self, text):
        self.failures.append(text)

    def __str__(self):
        return f"| {self.name} | {self.trials:,} | {len(self.failures)} | {self.note} |"


def failures_of(rows):
    """The first failures of each row, as text."""
    lines = []
    for row in rows:
        lines += [f"{row.name}: {failure}" for failure in row.failures[:SHOWN]]
        if len(row.failures) > SHOWN:
            lines.append(f"{row.name}: ... and {len(row.failures) - SHOWN} more")
    return "\n\n".join(lines)
