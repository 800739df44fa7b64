"""What a conformance check found, in words."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """One violated promise: which check found it, and what it saw."""

    check: str
    message: str

    def __str__(self) -> str:
        """Return `check: message`."""
        return f"{self.check}: {self.message}"


class ConformanceError(AssertionError):
    """A subject did not keep what it promises."""


@dataclass(frozen=True)
class Report:
    """What was checked and what was found.

    Attributes:
        subject: the rule, engine or drafter.
        findings: violated promises; empty when all were kept.
        notes: facts that are no violation, as the bias of a rule that calls itself lossy.
        num_cases: cases that ran.
    """

    subject: str
    num_cases: int
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether nothing was violated."""
        return not self.findings

    def __str__(self) -> str:
        """Return one line a finding, headed by the subject and the count of cases."""
        verdict = "passed" if self.passed else f"{len(self.findings)} violations"
        lines = [f"{self.subject}: {verdict} ({self.num_cases} cases)"]
        lines += [f"  violated: {finding}" for finding in self.findings]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def raise_if_failed(self) -> None:
        """Raise `ConformanceError` with the whole report if anything was violated."""
        if not self.passed:
            raise ConformanceError(str(self))
