"""What a FHIR Bundle must say of the findings, as the facts that `read_bundle` reads."""

from mappings.model.codes import PSA_DENSITY, SYSTEM_URLS, Code
from mappings.model.findings import Assessment, Finding, Findings
from mappings.model.ids import derive_uid, derive_uuid
from mappings.model.measurement import Measurement
from mappings.outputs.read_changes import (
    comparison_comments,
    comparison_sentence,
    gone_sentences,
    interval_of,
    links_of,
    numbers_of,
    row_of,
)
from mappings.outputs.read_facts import Facts, moment, number, place_words, prose, withheld
from mappings.outputs.read_revision import expect_withdrawn, people, person_words, withdrawn_uids

REPORT = "DiagnosticReport"
DENSITY = "psa_density"
OWN = "urn:wetread:codes"
UCUM = SYSTEM_URLS["UCUM"]
FINDING, TRACKING_ID = Code("121071", "DCM", "Finding"), Code("112039", "DCM", "Tracking Identifier")
SITE, LATERALITY = Code("363698007", "SCT", "Finding site"), Code("272741003", "SCT", "Laterality")


def observation_names(findings: Findings) -> dict[str, str]:
    """The identifiers that Observations must have, and what each is about."""
    names = {finding.tracking_uid: finding.tracking_id for finding in findings.findings}
    names |= {_overall_uid(findings, a): a.key for a in (*findings.assessments, *findings.blank_assessments)}
    return names | ({derive_uid(findings.gland.tracking_uid, DENSITY): DENSITY} if findings.gland else {})


def _overall_uid(findings: Findings, assessment: Assessment) -> str:
    return derive_uid(findings.study_instance_uid, findings.protocol_name, assessment.key)


def expect_bundle(findings: Findings, *, by_reference: bool) -> Facts:
    """Every fact of the Bundle. `by_reference` says that patient and order are references into the server that
    gave the context, not identifiers."""
    facts = Facts()
    patient, order = findings.context.patient, _order(findings, by_reference)
    known = patient.reference if patient is not None and by_reference else findings.patient.patient_id
    _expect_device(facts, findings)
    _expect_study(facts, findings)
    uids = _expect_observations(facts, findings)
    _expect_report(facts, findings, list(uids.values()))
    for where in ("ImagingStudy", REPORT, *uids):
        facts.add(where, "subject", withheld(known))
        if order:
            facts.add(where, "basedOn", withheld(order))
    for where in uids:
        facts.add(where, "resource", "Observation")
        facts.add(where, "device", withheld(_device(findings)))
        facts.add(where, "derivedFrom", withheld(_study(findings)))
    psa = _psa(findings, by_reference)
    if psa and findings.gland and findings.gland.measurement(DENSITY):
        facts.add(DENSITY, "derivedFrom", withheld(psa))
    context_order = order if findings.context.order is not None else ""
    sources = [s for s in (_study(findings), context_order, psa, _prior_report(findings)) if s]
    expect_withdrawn(facts, findings)
    _expect_provenance(facts, findings, sources, [*uids.values(), *withdrawn_uids(findings)])
    return facts


def _device(findings: Findings) -> str:
    return f"Device {findings.model.name}:{findings.model.version}"


def _study(findings: Findings) -> str:
    return f"ImagingStudy urn:oid:{findings.study_instance_uid}"


def _report(findings: Findings) -> str:
    return f"{REPORT} {findings.study_instance_uid}:{findings.protocol_name}"


def _prior_report(findings: Findings) -> str:
    done = findings.comparison
    return f"{done.prior_study_instance_uid}:{done.prior_protocol_name}" if done else ""


def _order(findings: Findings, by_reference: bool) -> str:
    order = findings.context.order
    by_reference = by_reference and order is not None and not order.from_message
    return order.reference if order is not None and by_reference else findings.accession_number


def _psa(findings: Findings, by_reference: bool) -> str:
    if findings.psa is None:
        return ""
    return findings.psa.reference if by_reference else f"{findings.psa.reference} of {findings.context.source}"


def _expect_device(facts: Facts, findings: Findings) -> None:
    model = findings.model
    facts.add("Device", "resource", "Device")
    facts.add("Device", "identifier", prose(_device(findings)))
    facts.add("Device", "name", prose(model.name))
    facts.add("Device", "model number", prose(model.name))
    facts.add("Device", "version", prose(model.version))
    facts.add("Device", "manufacturer", prose(model.manufacturer))


def _expect_study(facts: Facts, findings: Findings) -> None:
    where = "ImagingStudy"
    facts.add(where, "resource", "ImagingStudy")
    facts.add(where, "identifier urn:dicom:uid", f"urn:oid:{findings.study_instance_uid}")
    if findings.accession_number:
        facts.add(where, "identifier", withheld(findings.accession_number))
    facts.add(where, "started", findings.study_date.isoformat() if findings.study_date else "")


def _expect_state(facts: Facts, where: str, findings: Findings) -> None:
    facts.add(where, "status", findings.status)
    facts.add(where, "effectiveDateTime", findings.study_date.isoformat() if findings.study_date else "")
    facts.add(where, "issued", moment(findings.created_at))


def _expect_report(facts: Facts, findings: Findings, observations: list[str]) -> None:
    order = findings.context.order
    facts.add(REPORT, "resource", REPORT)
    _expect_state(facts, REPORT, findings)
    facts.add(REPORT, "identifier", prose(_report(findings)))
    if order is not None and order.code is not None:
        system = order.code_system_url or SYSTEM_URLS.get(order.code.scheme, "")
        facts.add(REPORT, "code", prose(f"{order.code.value} ({system})"))
    else:
        facts.add(REPORT, "code", prose(_name(findings.procedure or Code("18748-4", "LN", ""))))
    for assessment in findings.assessments:
        facts.add(REPORT, "conclusionCode", _name(assessment.value))
    for uid in observations:
        facts.add(REPORT, "result", withheld(f"Observation urn:oid:{uid}"))
    facts.add(REPORT, "imagingStudy", withheld(_study(findings)))
    if (signed := findings.signature) is not None:
        person = f"{person_words(signed.person)} {signed.identifier}".strip()
        facts.add(REPORT, "resultsInterpreter", withheld(person))


def _expect_provenance(facts: Facts, findings: Findings, sources: list[str], observations: list[str]) -> None:
    where, revision = "Provenance", str(findings.revision)
    facts.add(where, "resource", where)
    made = (findings.protocol_name, findings.study_instance_uid, findings.job_id, revision)
    facts.add(where, "tag", str(derive_uuid("provenance", *made)))
    facts.add(where, "recorded", moment(findings.created_at))
    facts.add(where, "agent", withheld(f"assembler {_device(findings)}"))
    for kind, person in people(findings):
        number = findings.signature.identifier if findings.signature and kind == "verifier" else ""
        facts.add(where, "agent", withheld(f"{kind} {person} {number}".strip()))
    first = "CREATE" if findings.revision == 1 else "UPDATE"
    facts.add(where, "activity", "NULLIFY" if findings.rejection else first)
    if findings.rejection:
        facts.add(where, "reason", prose(findings.rejection.reason))
    for source in sources:
        facts.add(where, "entity", withheld(source))
    for target in (_report(findings), *(f"Observation urn:oid:{uid}" for uid in observations)):
        facts.add(where, "target", withheld(target))


def _name(*codes: Code) -> str:
    return ", ".join(f"{code.value} ({SYSTEM_URLS.get(code.scheme, '')})" for code in codes)


def _own(key: str) -> str:
    return f"{key.replace(' ', '_')} ({OWN})"


def _expect_observations(facts: Facts, findings: Findings) -> dict[str, str]:
    """The facts of every Observation; the identifier of each by what it is about."""
    uids = {}
    for finding in findings.findings:
        uids[finding.tracking_id] = finding.tracking_uid
        _expect_state(facts, finding.tracking_id, findings)
        _expect_finding(facts, finding)
        _expect_change(facts, findings, finding)
    for assessment in findings.assessments:
        uids[assessment.key] = _overall_uid(findings, assessment)
        _expect_state(facts, assessment.key, findings)
        _expect_overall(facts, findings, assessment)
    for blank in findings.blank_assessments:
        uids[blank.key] = _overall_uid(findings, blank)
        _expect_state(facts, blank.key, findings)
        facts.add(blank.key, "code", f"{_name(blank.concept)}, {_own(blank.key)}")
        facts.add(blank.key, "absent because", prose("no longer given"))
    gland = findings.gland
    reasons = [blank.reason for blank in findings.blanks if "psa" in blank.name.casefold()]
    if gland is not None and (gland.measurement(DENSITY) or reasons):
        uids[DENSITY] = derive_uid(gland.tracking_uid, DENSITY)
        facts.add(gland.tracking_id, "hasMember", withheld(f"Observation urn:oid:{uids[DENSITY]}"))
        _expect_state(facts, DENSITY, findings)
        _expect_density(facts, gland.measurement(DENSITY), reasons)
    return uids


def _expect_overall(facts: Facts, findings: Findings, assessment: Assessment) -> None:
    where = assessment.key
    facts.add(where, "code", f"{_name(assessment.concept)}, {_own(assessment.key)}")
    facts.add(where, "value", f"{_name(assessment.value)}, {_own(assessment.score)}")
    facts.add(where, "note", prose(f"{assessment.rule}: {assessment.explanation}"))
    _expect_inputs(facts, where, assessment)
    for finding in findings.findings:
        facts.add(where, "hasMember", withheld(f"Observation urn:oid:{finding.tracking_uid}"))


def _expect_density(facts: Facts, density: Measurement | None, reasons: list[str]) -> None:
    facts.add(DENSITY, "code", f"{_name(PSA_DENSITY)}, {_own(DENSITY)}")
    if density is None:
        facts.add(DENSITY, "absent because", prose("; ".join(reasons)))
        return
    _expect_quantity(facts, DENSITY, "value", density)
    if density.method is not None:
        facts.add(DENSITY, "method", _name(density.method))


def _expect_quantity(facts: Facts, where: str, what: str, m: Measurement) -> None:
    facts.add(where, what, number(m.text))
    facts.add(where, f"{what}: unit", f"{m.unit.value}, {m.unit.value} ({SYSTEM_URLS[m.unit.scheme]})")


def _expect_finding(facts: Facts, finding: Finding) -> None:
    where = finding.tracking_id
    facts.add(where, "code", _name(FINDING))
    facts.add(where, "title", prose(finding.title))
    facts.add(where, "value", _name(finding.kind))
    places = [code for code in (finding.sector, finding.zone, finding.site) if code is not None]
    facts.add(where, "bodySite", _name(*places))
    words = place_words(finding) or finding.site.meaning.casefold()
    facts.add(where, "bodySite in words", prose(words))
    facts.add(where, "112039", prose(finding.tracking_id))
    facts.add(where, "112039: question", _name(TRACKING_ID))
    _expect_places(facts, where, finding)
    for m in finding.measurements:
        if m.key != DENSITY:
            _expect_quantity(facts, where, m.key, m)
            facts.add(where, f"{m.key}: question", _name(m.concept))
    _expect_notes(facts, where, finding)
    for assessment in finding.assessments:
        facts.add(where, assessment.key, f"{_name(assessment.value)}, {_own(assessment.score)}")
        facts.add(where, f"{assessment.key}: question", _name(assessment.concept))
        _expect_inputs(facts, where, assessment)


def _expect_places(facts: Facts, where: str, finding: Finding) -> None:
    places = (("site", SITE, finding.site), ("side", LATERALITY, finding.laterality), ("zone", SITE, finding.zone))
    for key, question, code in (*places, ("sector", SITE, finding.sector)):
        if code is not None:
            facts.add(where, key, _name(code))
            facts.add(where, f"{key}: question", _name(question))
    if finding.level:
        facts.add(where, "level", prose(finding.level))
        facts.add(where, "level: question", "")


def _expect_notes(facts: Facts, where: str, finding: Finding) -> None:
    for a in finding.assessments:
        facts.add(where, "note", prose(f"{a.label} {a.score} ({a.rule}): {a.explanation}"))
    for seen in finding.evidence:
        shown = f"Shown on {seen.role} series {seen.series_instance_uid}, instance {seen.sop_instance_uid}"
        facts.add(where, "note", prose(shown))
    for note in finding.notes:
        facts.add(where, "note", prose(note))


def _expect_inputs(facts: Facts, where: str, assessment: Assessment) -> None:
    for given in assessment.inputs:
        what = f"{assessment.key}.{given.name}".replace(" ", "_")
        if given.code is None and not given.value:
            continue
        facts.add(where, what, _name(given.code) if given.code else prose(given.value))
        if given.code is not None:
            facts.add(where, f"{what}: in words", prose(given.value))
        facts.add(where, f"{what}: question", _name(given.concept) if given.concept else "")


def _expect_change(facts: Facts, findings: Findings, finding: Finding) -> None:
    """What the comparison says of one finding, and where from; with the gland, what it says as a whole."""
    where, row, done = finding.tracking_id, row_of(findings, finding), findings.comparison
    gland = finding == findings.gland
    if gland:
        gone = [sentence for sentence, _ in gone_sentences(findings)]
        for said in (*comparison_sentence(findings), *gone, *comparison_comments(findings)):
            facts.add(where, "note", prose(said))
    if done is None or not (gland or row):
        return
    _expect_part(facts, where, "prior_study_uid", f"urn:oid:{done.prior_study_instance_uid}")
    _expect_part(facts, where, "prior_study_date", done.prior_study_date.isoformat())
    facts.add(where, "derivedFrom", withheld(f"urn:oid:{done.prior_study_instance_uid}"))
    for given in (*interval_of(findings), *numbers_of(findings, finding)):
        _expect_part(facts, where, given.key, f"{float(given.text):.10g}")
        facts.add(where, f"{given.key}: unit", f"{given.unit.value}, {given.unit.value} ({UCUM})")
    if row is None:
        return
    _expect_part(facts, where, "change_status", f"{row.status} ({OWN})")
    for concept, uid in links_of(row):
        _expect_part(facts, where, concept.value, f"urn:oid:{uid}")
    if row.prior is not None:
        facts.add(where, "derivedFrom", withheld(f"urn:oid:{row.prior.tracking_uid}"))
    for note in row.notes:
        facts.add(where, "note", prose(note))


def _expect_part(facts: Facts, where: str, key: str, value: str) -> None:
    """A component under Wetread's own code only."""
    facts.add(where, key, value)
    facts.add(where, f"{key}: question", "")
