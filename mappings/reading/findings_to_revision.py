"""The next revision of a released result, for each thing that people do to it: change, sign, withdraw, report.

A revision that cannot be made is refused with `RevisionRefused`: a sentence for the person who must decide. Nobody's
signature and nobody's change is dropped silently.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Literal

from mappings.model.findings import Findings, Status
from mappings.model.revision import Edit, OwnReport, Predecessor, Rejection, RevisionRefused, Signature, check_aware
from mappings.reading.edits_to_findings import apply_edits
from mappings.reading.revisions_to_difference import diff
from mappings.rules.result_status import SIGNED, find_refusal

WITHDRAWN: Status = "entered-in-error"


def edit_findings(released: Findings, edits: Sequence[Edit], now: datetime) -> Findings:
    """The next preliminary revision with what a person changed, before anybody signs. Raises RevisionRefused where the
    result is signed (a change to it needs a signature), withdrawn, or an edit names nothing that is there."""
    if not edits:
        raise RevisionRefused("No change was given.")
    if released.status in SIGNED:
        raise RevisionRefused(
            f"The result is {released.status}: a change to it must be signed. Sign it with the change."
        )
    _check_status(released, "preliminary")
    return apply_edits(start_revision(released, now), edits, released.revision + 1)


def sign_findings(
    released: Findings, signature: Signature, now: datetime, *, edits: Sequence[Edit] = (), text: str | None = None
) -> Findings:
    """The next revision, that `signature` stands behind, with what the person changed (`edits`) and the report in
    their own words (`text`; None leaves it as it is).

    The first signed revision is `final`. After it, a change of content makes it `corrected` where something that was
    said changed or is gone, `amended` where something was only added; a second signature under the same content
    leaves the status. Raises RevisionRefused where the result is withdrawn or an edit is not possible.
    """
    _check_status(released, "corrected" if released.status in SIGNED else "final")
    changes = list(edits)
    if text is not None and text.strip() != released.report_text:
        changes.append(Edit("text", signature.person, signature.signed_at, value=text))
    content = apply_edits(start_revision(released, now), changes, released.revision + 1)
    return replace(content, status=choose_signed_status(released, content), signature=signature)


def choose_signed_status(released: Findings, content: Findings) -> Status:
    """The status of a revision with `content` once a person signed it. FHIR R4: "final" becomes "amended" by any
    modification, "corrected" by one that mends an error; HL7 v2 calls both C."""
    if released.status not in SIGNED:
        return "final"
    difference = diff(released, content)
    if not difference:
        return released.status
    if released.status == "corrected" or not difference.only_adds:
        return "corrected"
    return "amended"


def withdraw_findings(released: Findings, rejection: Rejection, now: datetime) -> Findings:
    """The next revision, which takes the whole result back: `entered-in-error`. It keeps what was said, so that every
    system finds what to retract, but has no segmentation. Nothing follows it. Raises RevisionRefused where it is
    withdrawn already."""
    _check_status(released, WITHDRAWN)
    return replace(
        start_revision(released, now),
        status=WITHDRAWN,
        signature=None,
        rejection=replace(rejection, revision=released.revision),
        segments=(),
        findings=tuple(replace(finding, segment_number=None) for finding in released.findings),
    )


def note_own_report(released: Findings, report: OwnReport, now: datetime) -> Findings:
    """The next revision of the same status, which says that the radiologist's own report is there and counts. Raises
    RevisionRefused where the result is withdrawn or says so already."""
    if released.own_report == report:
        raise RevisionRefused("The result says already that the radiologist's own report is there.")
    _check_status(released, released.status)
    return replace(start_revision(released, now), own_report=report)


def start_revision(released: Findings, now: datetime) -> Findings:
    """A copy of `released` as its own successor, made at `now`: number, time, and what it replaces. A signature stays
    with the revision that it was given for, unless the status says that a person stands behind it."""
    check_aware(now, "a revision")
    return replace(
        released,
        revision=released.revision + 1,
        created_at=now,
        predecessor_revision=released.revision,
        predecessor=describe_predecessor(released),
    )


def describe_predecessor(released: Findings) -> Predecessor:
    """Which DICOM objects the revision has that is replaced. A withdrawn one has neither segments nor key images."""
    if released.status == WITHDRAWN:
        return Predecessor(released.revision, False, "", ())
    overview: Literal["gland", "overview"] = "gland" if released.gland is not None else "overview"
    lesions = tuple(lesion.tracking_id for lesion in released.lesions)
    return Predecessor(released.revision, bool(released.segments), overview, lesions)


def _check_status(released: Findings, new: Status) -> None:
    if why := find_refusal(released.status, new):
        raise RevisionRefused(why)
