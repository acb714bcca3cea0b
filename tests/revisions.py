"""Results as they go through revisions: signed, changed, rejected, read again; each rendered after the one before."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import jinja2

from mappings.model import codes
from mappings.model.findings import Findings
from mappings.model.revision import Edit, EditKind, OwnReport, Rejection, Signature
from mappings.outputs.dicom_header import write_dicom
from mappings.outputs.findings_to_bundle import findings_to_bundle
from mappings.outputs.findings_to_draft import draft_environment, findings_to_draft
from mappings.outputs.findings_to_oru import findings_to_oru
from mappings.outputs.findings_to_rejection_note import findings_to_rejection_note
from mappings.outputs.findings_to_seg import findings_to_seg
from mappings.outputs.findings_to_sr import findings_to_sr
from mappings.reading.findings_to_revision import edit_findings, note_own_report, sign_findings, withdraw_findings
from mappings.reading.rerun_to_revision import adopt_rerun, merge_rerun
from mappings.rules import pirads_v2_1
from tests.builders import NOW, build_findings, build_gland, build_lesion, build_masks
from tests.dicom_sources import build_sources
from tests.renderings import TEMPLATES, load_prostate_protocol, place_findings, render_contents

FERRER, WEISS = "Ferrer^Rosa^^Dr", "Weiß^Jörg^^"
OWN_WORDS = "Index lesion in the right PZ, 9 mm.\n\nNo extraprostatic extension."
Contents = dict[str, bytes]


def at(minutes: int) -> Any:
    """So many minutes after the first revision."""
    return NOW + timedelta(minutes=minutes)


def signed_by(person: str = FERRER, minutes: int = 5, identifier: str = "D-117") -> Signature:
    return Signature(person, "St. Elsewhere", at(minutes), identifier)


def edit(kind: EditKind, tracking_id: str = "", key: str = "", value: str = "", **more: Any) -> Edit:
    values = {"person": FERRER, "at": at(4), "reason": "seen on DWI", "key": key, "value": value} | more
    return Edit(kind, tracking_id=tracking_id, **values)


def first() -> Findings:
    """A preliminary result as the reading makes it: categories by the table, density with its method."""
    lesions = tuple(
        replace(lesion, assessments=(pirads_v2_1.assess_lesion("PZ", int(score), int(score), "not acquired"),))
        for lesion, score in ((build_lesion(1), "4"), (build_lesion(2, codes.LEFT, "2"), "2"))
    )
    gland = build_gland()
    density = replace(gland.measurements[-1], label="PSA density (volume by ellipsoid)", method=codes.ELLIPSOID)
    gland = replace(gland, measurements=(*gland.measurements[:-1], density))
    overall = pirads_v2_1.assess_study([lesion.assessments[0] for lesion in lesions])
    assert overall is not None
    return place_findings(build_findings(lesions=lesions, findings=(gland, *lesions), assessments=(overall,)))


@dataclass(frozen=True)
class Chain:
    """The revisions of one result in their order, each with its artifacts."""

    revisions: tuple[Findings, ...]
    contents: tuple[Contents, ...]

    @property
    def last(self) -> tuple[Findings, Contents, bytes | None]:
        """The last revision, its artifacts and the message before it."""
        before = self.contents[-2]["oru.hl7"] if len(self.contents) > 1 else None
        return self.revisions[-1], self.contents[-1], before


def render_chain(revisions: Sequence[Findings], **rendering: Any) -> Chain:
    """Each revision rendered with the message of the one before it."""
    contents: list[Contents] = []
    for findings in revisions:
        former = contents[-1]["oru.hl7"] if contents else None
        contents.append(render_contents(findings, former_oru=former, **rendering))
    return Chain(tuple(revisions), tuple(contents))


def read_again(released: Findings, *, version: str = "2", without: int | None = None) -> Findings:
    """A re-run of another model version that finds the lesions in another order, or lacks the one with this label."""
    kept = [lesion for lesion in first().lesions if lesion.label != without]
    lesions = tuple(
        replace(lesion, tracking_id=f"lesion-{n}", title=f"Lesion {n}", segment_number=3 + n)
        for n, lesion in enumerate(reversed(kept), 1)
    )
    base = first()
    segments = [s for s in base.segments if s.mask != "lesions"]
    rows = {s.label: s for s in base.segments if s.mask == "lesions"}
    segments += [
        replace(rows[f.label or 0], number=f.segment_number or 0, name=f.title, tracking_id=f.tracking_id)
        for f in lesions
    ]
    overall = pirads_v2_1.assess_study([lesion.assessments[0] for lesion in lesions])
    return replace(
        base,
        model=replace(base.model, version=version),
        findings=(base.findings[0], *lesions),
        segments=tuple(segments),
        assessments=(overall,) if overall else (),
    )


def build_chains() -> dict[str, tuple[Findings, ...]]:
    """One chain of revisions for each path that a result can take."""
    start = first()
    final = sign_findings(start, signed_by(), at(5))
    rejected = edit("rejected", "lesion-2", reason="artefact")
    dwi = edit("score", "lesion-1", "DWI score", "5")
    size = edit("measurement", "gland", "volume_ellipsoid", "65")
    touched = edit_findings(start, [dwi, edit("accepted", "lesion-2")], at(4))
    corrected = sign_findings(final, signed_by(WEISS, 9, ""), at(9), edits=[rejected, size])
    amended = sign_findings(final, signed_by(WEISS, 9), at(9), text=OWN_WORDS)
    rerun = merge_rerun(start, read_again(start), at(7))
    lost = merge_rerun(start, read_again(start, without=1), at(7))
    nothing_left = edit_findings(start, [rejected, edit("rejected", "lesion-1")], at(4))
    rejection = Rejection(FERRER, at(12), "wrong side of the study list")
    return {
        "final": (start, final),
        "touched": (start, touched),
        "touched, final": (start, touched, sign_findings(touched, signed_by(), at(5))),
        "corrected": (start, final, corrected),
        "amended": (start, final, amended),
        "amended, corrected": (start, final, amended, sign_findings(amended, signed_by(), at(11), edits=[rejected])),
        "countersigned": (start, final, sign_findings(final, signed_by(WEISS, 8), at(8))),
        "withdrawn": (start, withdraw_findings(start, rejection, at(12))),
        "final, withdrawn": (start, final, corrected, withdraw_findings(corrected, rejection, at(13))),
        "rerun": (start, rerun),
        "lesion lost": (start, lost),
        "found again": (start, lost, merge_rerun(lost, read_again(start, version="3"), at(8))),
        "no lesion left": (start, nothing_left, sign_findings(nothing_left, signed_by(), at(6))),
        "gland rejected": (start, edit_findings(start, [edit("rejected", "gland")], at(4))),
        "rerun adopted": (start, final, adopt_rerun(final, read_again(start, without=1), signed_by(), at(14))),
        "own report": (start, note_own_report(start, OwnReport("F", at(2)), at(3))),
    }


def render_messages(findings: Findings, former_oru: bytes | None) -> Contents:
    """SEG, SR, ORU, Bundle and the report of one revision: everything but its pictures."""
    sources = build_sources()
    seg = findings_to_seg(findings, build_masks(), sources)
    page = findings_to_draft(findings, draft_environment(jinja2.FileSystemLoader(TEMPLATES)), "prostate_mri")
    procedure = load_prostate_protocol().procedure
    oru = findings_to_oru(findings, text=page.text, former=former_oru, procedure=procedure)
    bundle = findings_to_bundle(findings, html=page.html, text=page.text, procedure=procedure)
    note = findings_to_rejection_note(findings, sources)
    return {
        **({"seg.dcm": write_dicom(seg)} if seg is not None else {}),
        "sr.dcm": write_dicom(findings_to_sr(findings, seg, sources)),
        **({"rejection.dcm": write_dicom(note)} if note is not None else {}),
        "oru.hl7": oru,
        "fhir-bundle.json": json.dumps(bundle).encode(),
        "report.txt": page.text.encode(),
        "report.html": page.html.encode(),
    }
