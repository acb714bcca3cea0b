"""The findings as FHIR R4 Observations: one a finding with its values as components, the PSA density and each
category of the whole study as their own."""

from collections.abc import Iterator
from dataclasses import dataclass

from mappings.model.codes import PSA_DENSITY, Code
from mappings.model.findings import Assessment, Dropped, Finding, Findings
from mappings.model.ids import derive_uid, derive_uuid
from mappings.model.measurement import Measurement
from mappings.outputs.comparison_to_observations import change_components, change_notes, change_sources
from mappings.outputs.fhir_elements import (
    MODEL,
    Json,
    to_concept,
    to_identifier,
    to_key,
    to_quantity,
    uid_identifier,
    without_empty,
)
from mappings.outputs.impression import describe_place
from mappings.outputs.revision_words import describe_dropped

FINDING = Code("121071", "DCM", "Finding")
FINDING_SITE = Code("363698007", "SCT", "Finding site")
LATERALITY = Code("272741003", "SCT", "Laterality")
TRACKING_ID = Code("112039", "DCM", "Tracking Identifier")
IMAGING_CATEGORY = {
    "coding": [{"system": "http://terminology.hl7.org/CodeSystem/observation-category", "code": "imaging"}]
}
ABSENT_REASON = "http://terminology.hl7.org/CodeSystem/data-absent-reason"
PSA_DENSITY_KEY = "psa_density"
WITHDRAWN = "entered-in-error"


@dataclass(frozen=True)
class Links:
    """References that the Observations share: subject, order, study, device, the PSA's Observation."""

    subject: Json
    order: Json | None
    study: Json
    device: Json
    psa: Json | None


def full_url(findings: Findings, *parts: str) -> str:
    """The `urn:uuid` of one entry, derived from study, protocol and what it holds."""
    return derive_uuid("fhir", findings.study_instance_uid, findings.protocol_name, *parts).urn


def _observation_entry(findings: Findings, links: Links, uid: str, **content: object) -> Json:
    resource = {
        "resourceType": "Observation",
        "identifier": [uid_identifier(uid)],
        "basedOn": [links.order] if links.order else None,
        "status": findings.status,
        "category": [IMAGING_CATEGORY],
        "subject": links.subject,
        "effectiveDateTime": findings.study_date.isoformat() if findings.study_date else None,
        "issued": findings.created_at.isoformat(),
        "device": links.device,
        **content,
    }
    return {"fullUrl": full_url(findings, "Observation", uid), "resource": without_empty(resource)}


def _measurement_component(measurement: Measurement) -> Json:
    key = to_key(measurement.key, measurement.label)
    code = to_concept(measurement.concept, key, text=measurement.label)
    return {"code": code, "valueQuantity": to_quantity(measurement)}


def _place_components(finding: Finding) -> Iterator[Json]:
    places = (
        (FINDING_SITE, to_key("site", "Finding site"), finding.site),
        (LATERALITY, to_key("side", "Side"), finding.laterality),
        (FINDING_SITE, to_key("zone", "Zone"), finding.zone),
        (FINDING_SITE, to_key("sector", "Sector"), finding.sector),
    )
    for concept, key, code in places:
        if code is not None:
            yield {
                "code": to_concept(concept, key, text=key.meaning),
                "valueCodeableConcept": to_concept(code),
            }
    if finding.level:
        yield {"code": to_concept(to_key("level", "Level")), "valueString": finding.level}


def _input_components(assessment: Assessment) -> Iterator[Json]:
    for given in assessment.inputs:
        key = to_key(f"{assessment.key}.{given.name}", given.name)
        code = to_concept(given.concept, key, text=given.name) if given.concept else to_concept(key)
        if given.code:
            yield {"code": code, "valueCodeableConcept": to_concept(given.code, text=given.value)}
        elif given.value:
            yield {"code": code, "valueString": given.value}


def _assessment_components(assessment: Assessment) -> Iterator[Json]:
    code = to_concept(assessment.concept, to_key(assessment.key, assessment.label), text=assessment.label)
    yield {"code": code, "valueCodeableConcept": _category(assessment)}
    yield from _input_components(assessment)


def _category(assessment: Assessment) -> Json:
    score = Code(assessment.score, "99WETREAD", f"{assessment.label} {assessment.score}")
    return to_concept(assessment.value, score)


def _components(findings: Findings, finding: Finding) -> list[Json]:
    tracking = {"code": to_concept(TRACKING_ID), "valueString": finding.tracking_id}
    measured = (m for m in finding.measurements if m.key != PSA_DENSITY_KEY)
    return [
        tracking,
        *_place_components(finding),
        *(_measurement_component(m) for m in measured),
        *(component for a in finding.assessments for component in _assessment_components(a)),
        *change_components(findings, finding),
    ]


def _notes(findings: Findings, finding: Finding) -> list[Json]:
    why = [f"{a.label} {a.score} ({a.rule}): {a.explanation}" for a in finding.assessments]
    shown = [
        f"Shown on {e.role} series {e.series_instance_uid}, instance {e.sop_instance_uid}" for e in finding.evidence
    ]
    return [{"text": text} for text in (*why, *shown, *finding.notes, *change_notes(findings, finding))]


def _body_site(finding: Finding) -> Json:
    """The most precise place first; the side is in the sector's code and in the text."""
    codes = [code for code in (finding.sector, finding.zone, finding.site) if code is not None]
    return to_concept(*codes, text=describe_place(finding) or finding.site.meaning)


def _density_uid(finding: Finding) -> str:
    return derive_uid(finding.tracking_uid, PSA_DENSITY_KEY)


def _density_value(findings: Findings, density: Measurement | None) -> Json | None:
    """The value, or why it is absent: an older revision's value must not stay in the EHR. None where neither
    a value nor a blank speaks of PSA."""
    if density is not None:
        method = to_concept(density.method) if density.method else None
        return without_empty({"valueQuantity": to_quantity(density), "method": method})
    reasons = [blank.reason for blank in findings.blanks if "PSA" in blank.name.upper()]
    if not reasons:
        return None
    coding = [{"system": ABSENT_REASON, "code": "unknown"}]
    return {"dataAbsentReason": {"coding": coding, "text": "; ".join(reasons)}}


def density_entry(findings: Findings, links: Links) -> Json | None:
    """The PSA density as its own Observation, derived from the PSA's; None where the findings have no gland."""
    gland = findings.gland
    value = _density_value(findings, gland.measurement(PSA_DENSITY_KEY)) if gland else None
    if gland is None or value is None:
        return None
    key = to_key(PSA_DENSITY_KEY, "PSA density")
    sources = [links.study, *([links.psa] if links.psa and "valueQuantity" in value else [])]
    code = to_concept(PSA_DENSITY, key, text=key.meaning)
    return _observation_entry(findings, links, _density_uid(gland), code=code, derivedFrom=sources, **value)


def finding_entry(findings: Findings, links: Links, finding: Finding, members: list[Json], **changes: object) -> Json:
    """One finding: what it is as value, where as body site, its values as components; `changes` are elements that
    differ."""
    content: Json = {"note": _notes(findings, finding)} | changes
    return _observation_entry(
        findings,
        links,
        finding.tracking_uid,
        code=to_concept(FINDING, text=finding.title),
        valueCodeableConcept=to_concept(finding.kind),
        bodySite=_body_site(finding),
        hasMember=members,
        derivedFrom=[links.study, *change_sources(findings, finding)],
        component=_components(findings, finding),
        **content,
    )


def _study_uid(findings: Findings, assessment: Assessment) -> str:
    return derive_uid(findings.study_instance_uid, findings.protocol_name, assessment.key)


def study_entry(findings: Findings, links: Links, assessment: Assessment, members: list[Json]) -> Json:
    """One category of the whole study, with the findings as members."""
    key = to_key(assessment.key, assessment.label)
    return _observation_entry(
        findings,
        links,
        _study_uid(findings, assessment),
        code=to_concept(assessment.concept, key, text=assessment.label),
        valueCodeableConcept=_category(assessment),
        note=[{"text": f"{assessment.rule}: {assessment.explanation}"}],
        hasMember=members,
        derivedFrom=[links.study],
        component=list(_input_components(assessment)),
    )


def blank_entry(findings: Findings, links: Links, assessment: Assessment) -> Json:
    """A category that a former revision gave and this one does not: absent, as the value must not stay in the EHR."""
    key = to_key(assessment.key, assessment.label)
    return _observation_entry(
        findings,
        links,
        _study_uid(findings, assessment),
        code=to_concept(assessment.concept, key, text=assessment.label),
        dataAbsentReason={"coding": [{"system": ABSENT_REASON, "code": "unknown"}], "text": "no longer given"},
        derivedFrom=[links.study],
    )


def dropped_entries(findings: Findings, links: Links) -> list[Json]:
    """The Observations of findings that former revisions reported and this one does not: entered in error, with what
    they said, why, and the model that had proposed them."""
    return [entry for row in findings.dropped for entry in _dropped_entry(findings, links, row)]


def _dropped_entry(findings: Findings, links: Links, row: Dropped) -> Iterator[Json]:
    finding = row.finding
    density = finding.measurement(PSA_DENSITY_KEY)
    device = links.device
    if row.model != findings.model:
        model = to_identifier(MODEL, f"{row.model.name}:{row.model.version}")
        device = {"type": "Device", "identifier": model}
    changes: Json = {"status": WITHDRAWN, "device": device, "note": [{"text": f"{describe_dropped(row)}."}]}
    members = []
    if density is not None:
        key = to_key(PSA_DENSITY_KEY, "PSA density")
        code = to_concept(PSA_DENSITY, key, text=key.meaning)
        content = {**changes, "valueQuantity": to_quantity(density), "derivedFrom": [links.study]}
        entry = _observation_entry(findings, links, _density_uid(finding), code=code, **content)
        members = [{"reference": entry["fullUrl"]}]
        yield entry
    yield finding_entry(findings, links, finding, members, **changes)


def findings_to_observations(findings: Findings, links: Links) -> list[Json]:
    """All entries (`fullUrl`, `resource`): categories of the study first, given or blank, then each finding, then the
    density."""
    density = density_entry(findings, links)
    gland = findings.gland

    def members(finding: Finding) -> list[Json]:
        owns = density is not None and gland is not None and finding.tracking_uid == gland.tracking_uid
        return [{"reference": density["fullUrl"]}] if density and owns else []

    parts = [finding_entry(findings, links, finding, members(finding)) for finding in findings.findings]
    references = [{"reference": part["fullUrl"]} for part in parts]
    whole = [study_entry(findings, links, a, references) for a in findings.assessments]
    blank = [blank_entry(findings, links, a) for a in findings.blank_assessments]
    return [*whole, *blank, *parts, *([density] if density else [])]
