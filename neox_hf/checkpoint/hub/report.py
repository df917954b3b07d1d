"""What became of the revisions of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishReport:
    """pushed: revisions, in order. pending: (revision, reason) of each that is not on the Hub. command: pushes them."""

    pushed: list[str]
    pending: list[tuple[str, str]]
    command: str

    def __str__(self) -> str:
        lines = [f"pushed to the Hub: {', '.join(self.pushed) or 'nothing'}"]
        lines += [f"not pushed: {revision} ({reason})" for revision, reason in self.pending]
        if self.pending:
            lines.append(f"push later with: {self.command}")
        return "\n".join(lines)
