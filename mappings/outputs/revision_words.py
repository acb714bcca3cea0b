"""What people did to a result, in sentences that every rendering shares. Nothing where no person did anything."""

from datetime import datetime

from mappings.model.findings import Dropped, Findings
from mappings.model.revision import Edit

LEAD = "Revision: "


def name_person(name: str) -> str:
    """A DICOM person name as `Family, Given Middle`; the first representation that is not empty."""
    group = next((group for group in name.split("=") if group.strip("^ ")), "")
    family, _, rest = group.partition("^")
    given = " ".join(part.strip() for part in rest.split("^")[:2] if part.strip())
    return ", ".join(part for part in (family.strip(), given) if part)


def _moment(when: datetime) -> str:
    return when.isoformat(sep=" ", timespec="minutes")


def _by(person: str, when: datetime, reason: str) -> str:
    return f"by {name_person(person)}, {_moment(when)}{f': {reason}' if reason else ''}"


def signature_sentence(findings: Findings) -> str:
    """Who signed, for whom and when; empty where nobody did."""
    signed = findings.signature
    if signed is None:
        return ""
    return f"Signed by {name_person(signed.person)}, {signed.organisation}, {_moment(signed.signed_at)}."


def own_report_sentence(findings: Findings) -> str:
    """That the radiologist's own report is there; empty where it is not known to be."""
    report = findings.own_report
    if report is None:
        return ""
    status = {"P": "preliminary", "F": "final", "C": "corrected"}[report.status]
    made = f" of {_moment(report.reported_at)}" if report.reported_at else ""
    return f"The radiologist's own {status} report{made} takes precedence over this result."


def _describe_edit(edit: Edit) -> str:
    by = _by(edit.person, edit.at, edit.reason)
    if edit.kind == "accepted":
        return f"{edit.title} accepted {by}"
    before, after = edit.before or "nothing", edit.after or "nothing"
    return f"{edit.title}, {edit.label} changed from {before} to {after} {by}"


def describe_dropped(row: Dropped) -> str:
    """Which finding is no longer reported, and why."""
    name = f"{row.finding.title} ({row.finding.tracking_id})"
    if row.why == "rejected" and row.at is not None:
        return f"{name} rejected {_by(row.person, row.at, row.reason)}"
    return f"{name} is not reported since revision {row.revision}: {row.why}"


def _withdrawal(findings: Findings) -> list[str]:
    rejection = findings.rejection
    if rejection is None:
        return []
    return [f"revision {rejection.revision} withdrawn {_by(rejection.person, rejection.at, rejection.reason)}"]


def revision_sentences(findings: Findings) -> list[str]:
    """Withdrawal, own report, signature, what a person changed or accepted, what is no longer reported: one line
    each."""
    edits = [_describe_edit(edit) for edit in findings.edits if edit.kind != "rejected"]
    dropped = [describe_dropped(row) for row in findings.dropped]
    who = [s for s in (own_report_sentence(findings), signature_sentence(findings)) if s]
    lines = [*_withdrawal(findings), *who, *edits, *dropped]
    return [f"{LEAD}{line.removesuffix('.')}." for line in lines]


def people_of(findings: Findings) -> tuple[str, ...]:
    """Everyone who signed, changed or withdrew something, once each."""
    signed = [findings.signature.person] if findings.signature else []
    withdrew = [findings.rejection.person] if findings.rejection else []
    return tuple(dict.fromkeys([*signed, *withdrew, *(edit.person for edit in findings.edits)]))
