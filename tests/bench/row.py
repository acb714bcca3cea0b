"""One row of the table that `make bench` prints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What was measured: our number, the rival's, their ratio, and the budget that one of them must keep.

    `budget` is in words as DESIGN.md has it; `within` is None where there is no budget.
    """

    what: str
    unit: str
    ours: float
    budget: str = ""
    within: bool | None = None
    rival: float | None = None
    rival_name: str = ""
    ratio: float | None = None

    def line(self) -> str:
        """The row as one line of text."""
        rival = f" | {self.rival_name} {self.rival:.4g} {self.unit}" if self.rival is not None else ""
        ratio = f" | ratio {self.ratio:.2f}" if self.ratio is not None else ""
        verdict = {None: "", True: ", kept", False: ", OVER"}[self.within]
        return f"{self.what} | ours {self.ours:.4g} {self.unit}{rival}{ratio} | budget {self.budget or '-'}{verdict}"
