"""Which status of a result may follow which, so that no system ever sees one go backwards.

Sources: FHIR R4 4.0.1 DiagnosticReport.status and Observation.status (preliminary > final > amended or corrected,
which are changes after final; entered-in-error ends it); HL7 v2.5.1 table 0123 (a final result "can only be changed
with a corrected result") and table 0085 (P, F, C, and W for what was posted wrongly).
"""

from typing import Literal

from mappings.model.findings import Status

RANKS: dict[Status, int] = {"preliminary": 0, "final": 1, "amended": 2, "corrected": 2, "entered-in-error": 3}
"""How far along a status is; `amended` and `corrected` both follow final, in any order."""

SIGNED: tuple[Status, ...] = ("final", "amended", "corrected")
"""Statuses that a person stands behind."""

ReportStatus = Literal["", "P", "F", "C", "X"]
"""OBR-25 of somebody else's report; empty where there is none."""


def may_follow(old: Status, new: Status) -> bool:
    """Whether a revision with status `new` may replace one with status `old`."""
    return not find_refusal(old, new)


def find_refusal(old: Status, new: Status) -> str:
    """Why a revision with status `new` may not replace one with status `old`, for the person who must decide; empty
    where it may."""
    if old == "entered-in-error":
        return (
            "The result was withdrawn as entered in error, which nothing follows in the EHR and the RIS; "
            "a new result needs a person who reports it as their own."
        )
    if RANKS[new] < RANKS[old]:
        return (
            f"The result is {old}: a person signed it, and a {new} one may not take its place. "
            "Look at the new reading and sign a correction, or leave the signed result as it is."
        )
    if old == "preliminary" and new in ("amended", "corrected"):
        return f"The result was never final, so that its first signed revision is final, not {new}."
    return ""


def find_report_refusal(report: ReportStatus, new: Status) -> str:
    """Why a result with status `new` may not be sent for an order that has the radiologist's own report with OBR-25
    `report`; empty where it may. A withdrawal may always be sent."""
    if report not in ("F", "C") or new == "entered-in-error":
        return ""
    if new == "preliminary":
        return (
            "The radiologist's own final report is there: a preliminary result for the same order would put its "
            "status back. Look at the result beside the report, and sign it if it adds something."
        )
    return ""
