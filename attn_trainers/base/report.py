"""The report that a run's checks write before anything is loaded: lines and warnings."""

from dataclasses import dataclass, field


@dataclass
class Report:
    """Lines of the preflight's report.

    Attributes:
        rows: (name, value) pairs; a pair with an empty value is a heading.
        warnings: what may not be meant so.
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, name: str, value: object) -> None:
        self.rows.append((name, str(value)))

    def heading(self, name: str) -> None:
        self.rows.append((name, ""))

    def __str__(self) -> str:
        width = max((len(name) for name, value in self.rows if value), default=0)
        lines = [f"  {name.ljust(width)}  {value}" if value else name for name, value in self.rows]
        return "\n".join(["Preflight", *lines, *(f"Warning: {warning}" for warning in self.warnings)])
