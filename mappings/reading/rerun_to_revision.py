"""A second reading of the same study (late images, another model version) as a revision of the first.

A lesion keeps its tracking id and UID where it is the same lesion: an observation in the EHR must not be overwritten
with another lesion's values. Lesions are matched by position as `priors_to_changes` does between sittings; what
cannot be matched with certainty is a new lesion, and the former one is no longer reported.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from mappings.model.changes import PriorRefused
from mappings.model.findings import Blank, Dropped, Finding, Findings
from mappings.model.ids import derive_uid
from mappings.model.revision import Edit, RevisionRefused, Signature
from mappings.reading.findings_to_revision import choose_signed_status, start_revision
from mappings.reading.priors_to_changes import DEFAULT_GATES, align_glands, move_lesion, pair_lesions
from mappings.rules.result_status import SIGNED, find_refusal

_NUMBER = re.compile(r"lesion-(\d+)")


def merge_rerun(released: Findings, rerun: Findings, now: datetime) -> Findings:
    """`rerun` as the next preliminary revision of `released`. Raises RevisionRefused where a person signed, changed or
    withdrew the released one: then a person must look (`adopt_rerun` after they did), and where the two are not of
    one study and protocol."""
    _check_same(released, rerun)
    if why := find_refusal(released.status, "preliminary"):
        raise RevisionRefused(why)
    if released.edits:
        count = len(released.edits)
        raise RevisionRefused(
            f"A person made {count} change{'s' if count > 1 else ''} to the result, which the new reading lacks. "
            "Look at both, then keep the result or take the new reading over under your name."
        )
    return _follow(released, rerun, now)


def adopt_rerun(released: Findings, rerun: Findings, signature: Signature, now: datetime) -> Findings:
    """`rerun` as the next revision under a person's name, whatever the released one is (but withdrawn): final, or
    amended or corrected after a signed one. Neither what people changed before carries over nor the report in their own
    words; that a reading was taken over in their place is said."""
    _check_same(released, rerun)
    if why := find_refusal(released.status, "corrected" if released.status in SIGNED else "final"):
        raise RevisionRefused(why)
    content = replace(_follow(released, rerun, now), edits=(_describe_rerun(released, rerun, signature),))
    return replace(content, status=choose_signed_status(released, content), signature=signature)


def reports_the_same(released: Findings, rerun: Findings) -> bool:
    """Whether a re-run says nothing new: equal but for numbers, times, status, what people did, and why other series
    were not read. Compare with the last reading where a person changed the result after it: their changes are no news
    of the model's."""
    named = keep_identities(released, rerun)
    return _neutral(released, named) == _neutral(named, named)


def _neutral(findings: Findings, like: Findings) -> Findings:
    """`findings` with everything of `like` that does not count."""
    return replace(
        findings,
        revision=like.revision,
        created_at=like.created_at,
        status=like.status,
        predecessor_revision=like.predecessor_revision,
        predecessor=like.predecessor,
        signature=like.signature,
        edits=like.edits,
        report_text=like.report_text,
        dropped=like.dropped,
        blank_assessments=like.blank_assessments,
        own_report=like.own_report,
        roles=tuple(replace(role, reasons=()) for role in findings.roles),
    )


def _describe_rerun(released: Findings, rerun: Findings, signature: Signature) -> Edit:
    before, after = (f"{f.model.name} {f.model.version}" for f in (released, rerun))
    count = len(released.edits)
    return Edit(
        "rerun",
        signature.person,
        signature.signed_at,
        reason=f"changes by hand that it does not have: {count}" if count else "",
        title="Result",
        label="reading",
        before=f"revision {released.revision} by {before}",
        after=f"a new one by {after}",
    )


def _check_same(released: Findings, rerun: Findings) -> None:
    pairs = (
        ("studies", released.study_instance_uid, rerun.study_instance_uid),
        ("protocols", released.protocol_name, rerun.protocol_name),
        ("jobs", released.job_id, rerun.job_id),
        ("patients", released.patient.patient_id, rerun.patient.patient_id),
    )
    for what, one, other in pairs:
        if one != other:
            raise RevisionRefused(f"The new reading is no revision of the result: they are of different {what}.")


def _follow(released: Findings, rerun: Findings, now: datetime) -> Findings:
    """The re-run with the released findings' identities, as their successor."""
    named = keep_identities(released, rerun)
    start = start_revision(released, now)
    uids = {finding.tracking_uid for finding in named.findings}
    gone = tuple(
        Dropped(f, released.model, start.revision, "not found again")
        for f in released.findings
        if f.tracking_uid not in uids
    )
    given = {a.key for a in named.assessments}
    blank = (*released.blank_assessments, *released.assessments)
    return replace(
        named,
        status="preliminary",
        created_at=now,
        revision=start.revision,
        predecessor_revision=start.predecessor_revision,
        predecessor=start.predecessor,
        dropped=(*released.dropped, *gone),
        blank_assessments=tuple({a.key: a for a in blank if a.key not in given}.values()),
        own_report=released.own_report,
    )


def keep_identities(released: Findings, rerun: Findings) -> Findings:
    """`rerun` with the tracking ids, UIDs and titles of `released` where a lesion is the same, and with ids that no
    revision ever used where it is not, in findings, segments, blanks and the comparison."""
    matched = _match(released, rerun)
    free = max((int(m[1]) for f in _ever(released) if (m := _NUMBER.fullmatch(f.tracking_id))), default=0)
    renamed = _name_gland(released, rerun)
    for lesion in rerun.lesions:
        if (old := matched.get(lesion.tracking_id)) is not None:
            named = replace(lesion, tracking_id=old.tracking_id, tracking_uid=old.tracking_uid, title=old.title)
        else:
            free += 1
            tracking_id = f"lesion-{free}"
            uid = derive_uid(rerun.job_id, "finding", tracking_id)
            named = replace(lesion, tracking_id=tracking_id, tracking_uid=uid, title=f"Lesion {free}")
        renamed[lesion.tracking_id] = named
    return _rename(rerun, renamed)


def _name_gland(released: Findings, rerun: Findings) -> dict[str, Finding]:
    """The gland under the UID that it has. What was withdrawn once stays so: a gland that is found again after it was
    lost is another observation."""
    gland, known = rerun.gland, released.gland
    if gland is None:
        return {}
    uid = known.tracking_uid if known is not None else gland.tracking_uid
    if uid in {row.finding.tracking_uid for row in released.dropped}:
        uid = derive_uid(rerun.job_id, "finding", gland.tracking_id, released.revision + 1)
    return {gland.tracking_id: replace(gland, tracking_uid=uid)}


def _ever(released: Findings) -> Sequence[Finding]:
    return [*released.findings, *(row.finding for row in released.dropped)]


def _match(released: Findings, rerun: Findings) -> dict[str, Finding]:
    """The released lesion that each lesion of the re-run is, by its tracking id there; those in doubt are left out."""
    olds = released.lesions
    if released.reference_frame_uid != rerun.reference_frame_uid:
        try:
            transform = align_glands(rerun, released)
        except PriorRefused:
            return {}
        olds = tuple(move_lesion(lesion, transform) for lesion in olds)
    best, doubtful = pair_lesions(rerun, olds, DEFAULT_GATES)
    return {
        rerun.lesions[row].tracking_id: released.lesions[column] for row, column in best.items() if row not in doubtful
    }


def _rename(rerun: Findings, renamed: Mapping[str, Finding]) -> Findings:
    segments = tuple(
        replace(s, name=new.title, tracking_id=new.tracking_id, tracking_uid=new.tracking_uid)
        if (new := renamed.get(s.tracking_id)) is not None
        else s
        for s in rerun.segments
    )
    done = rerun.comparison
    if done is not None:
        rows = (
            replace(
                row,
                current=replace(row.current, tracking_id=n.tracking_id, tracking_uid=n.tracking_uid, title=n.title),
            )
            if row.current is not None and (n := renamed.get(row.current.tracking_id)) is not None
            else row
            for row in done.lesions
        )
        done = replace(done, lesions=tuple(rows))
    return replace(
        rerun,
        findings=tuple(renamed.get(f.tracking_id, f) for f in rerun.findings),
        segments=segments,
        blanks=tuple(_rename_blank(blank, renamed) for blank in rerun.blanks),
        comparison=done,
    )


def _rename_blank(blank: Blank, renamed: Mapping[str, Finding]) -> Blank:
    """A blank of a lesion begins with its tracking id."""
    first, space, rest = blank.name.partition(" ")
    new = renamed.get(first)
    return replace(blank, name=f"{new.tracking_id}{space}{rest}") if new else blank
