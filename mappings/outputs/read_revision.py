"""What people did to a result, as every rendering must say it, worked out anew from the findings."""

from collections.abc import Iterator, Sequence
from datetime import datetime

from mappings.model.codes import PSA_DENSITY
from mappings.model.findings import Dropped, Findings
from mappings.model.ids import derive_uid
from mappings.outputs.read_facts import Facts, compare, prose, squeeze, withheld

START = "Revision:"
WHERE = "revision"
OWN_STATUS = {"P": "preliminary", "F": "final", "C": "corrected"}


def verification_of(findings: Findings) -> str:
    """The words that a DICOM object must begin its description with."""
    if findings.status == "entered-in-error":
        return "AI result, WITHDRAWN, do not use"
    return "AI result, verified by a person" if findings.signature else "AI result, not verified"


def person_words(name: str) -> str:
    """`Family, Given Middle` of a DICOM person name."""
    for group in name.split("="):
        parts = [part.strip() for part in group.split("^")]
        if any(parts):
            given = " ".join(part for part in parts[1:3] if part)
            return ", ".join(part for part in (parts[0], given) if part)
    return ""


def _minute(when: datetime) -> str:
    return f"{when.isoformat(sep=' ', timespec='minutes')}"


def signature_words(findings: Findings) -> str:
    """The sentence on who signed; empty where nobody did."""
    s = findings.signature
    return f"Signed by {person_words(s.person)}, {s.organisation}, {_minute(s.signed_at)}" if s else ""


def _done(person: str, when: datetime, reason: str) -> str:
    end = f": {reason}" if reason else ""
    return f"by {person_words(person)}, {_minute(when)}{end}"


def _said(findings: Findings) -> Iterator[str]:
    if (gone := findings.rejection) is not None:
        yield f"revision {gone.revision} withdrawn {_done(gone.person, gone.at, gone.reason)}"
    if (own := findings.own_report) is not None:
        of = f" of {_minute(own.reported_at)}" if own.reported_at else ""
        yield f"The radiologist's own {OWN_STATUS[own.status]} report{of} takes precedence over this result"
    if findings.signature:
        yield signature_words(findings)
    for edit in findings.edits:
        if edit.kind == "accepted":
            yield f"{edit.title} accepted {_done(edit.person, edit.at, edit.reason)}"
        elif edit.kind != "rejected":
            values = f"from {edit.before or 'nothing'} to {edit.after or 'nothing'}"
            yield f"{edit.title}, {edit.label} changed {values} {_done(edit.person, edit.at, edit.reason)}"
    for row in findings.dropped:
        yield dropped_words(row)


def dropped_words(row: Dropped) -> str:
    """Which finding is no longer reported, and why."""
    name = f"{row.finding.title} ({row.finding.tracking_id})"
    if row.why == "rejected" and row.at:
        return f"{name} rejected {_done(row.person, row.at, row.reason)}"
    return f"{name} is not reported since revision {row.revision}: {row.why}"


def expect_lines(findings: Findings) -> list[str]:
    """The lines on the revision, each with its lead."""
    return [f"{START} {words.removesuffix('.')}." for words in _said(findings)]


def check_lines(artifact: str, lines: Sequence[str], findings: Findings) -> list[str]:
    """Each line that is missing, extra or different."""
    expected, found = Facts(), Facts()
    for line in expect_lines(findings):
        expected.add(WHERE, "line", prose(line))
    for line in lines:
        found.add(WHERE, "line", prose(line))
    return compare(artifact, expected, found)


def take_lines(text: str, findings: Findings) -> tuple[list[str], str]:
    """What is wrong with the lines in a squeezed text, and the text without them: people's words may look like any
    other line of it."""
    block = squeeze("".join(expect_lines(findings)))
    rest = text.replace(block, "", 1) if block else text
    slips = [] if block in text else [f"{WHERE}: line: expected the {len(expect_lines(findings))} lines on it"]
    strange = squeeze(START) in rest and not slips
    return slips + ([f"{WHERE}: line: expected no more lines on it, found one"] if strange else []), rest


def check_own_words(artifact: str, words: str, findings: Findings) -> list[str]:
    """The report in the signing person's words, whatever its line breaks."""
    if squeeze(words) == squeeze(findings.report_text):
        return []
    return [f"{artifact}: {WHERE}: report as signed: expected the words of the person who signed, found others"]


def people(findings: Findings) -> Iterator[tuple[str, str]]:
    """Everyone who must be an agent of the Provenance: the kind of their part, and their name."""
    signed = findings.signature
    if signed:
        yield "verifier", person_words(signed.person)
    others = [findings.rejection.person] if findings.rejection else []
    for person in dict.fromkeys([*others, *(edit.person for edit in findings.edits)]):
        if signed is None or person != signed.person:
            yield "author", person_words(person)


def withdrawn_uids(findings: Findings) -> dict[str, str]:
    """The Observations that must be entered in error, by identifier, and how each is called."""
    uids = {}
    for row in findings.dropped:
        finding = row.finding
        uids[finding.tracking_uid] = f"withdrawn {finding.tracking_id}"
        if any(m.concept == PSA_DENSITY for m in finding.measurements):
            uids[derive_uid(finding.tracking_uid, "psa_density")] = f"withdrawn {finding.tracking_id} psa_density"
    return uids


def expect_withdrawn(facts: Facts, findings: Findings) -> None:
    """What is compared of Observations that are entered in error: status, identity, why."""
    names = withdrawn_uids(findings)
    for row in findings.dropped:
        for uid in (row.finding.tracking_uid, derive_uid(row.finding.tracking_uid, "psa_density")):
            if uid not in names:
                continue
            where = names[uid]
            facts.add(where, "resource", "Observation")
            facts.add(where, "status", "entered-in-error")
            facts.add(where, "device", withheld(f"{row.model.name}:{row.model.version}"))
            facts.add(where, "note", prose(f"{dropped_words(row)}."))
