"""Earlier studies of the patient that the protocol would read too: in our own memory, the PACS and the EHR."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from pydantic import TypeAdapter

from mappings.inputs.imaging_studies_to_studies import imaging_study_to_study, qido_to_study
from mappings.model.changes import FoundIn, PriorStudy
from mappings.model.findings import Findings
from mappings.model.protocol import Protocol
from mappings.model.study import Study
from mappings.reading.series_to_roles import match_protocol
from middleware.ports import ContextSource, ImageArchive
from middleware.store.artifacts import ArtifactStore
from middleware.store.hearing import HearingStore
from middleware.store.queries import Store
from middleware.store.tables import StudyJob

MOST_CANDIDATES = 20
"""The newest studies of a patient whose series are looked at; older ones are not compared anyway."""
_FINDINGS = TypeAdapter(Findings)
_INCLUDED = ("ModalitiesInStudy", "StudyDescription", "IssuerOfPatientID", "PatientBirthDate", "PatientSex")


def find_own(
    store: Store, heard: HearingStore, artifacts: ArtifactStore, study: Study, protocol: Protocol
) -> list[tuple[PriorStudy, str]]:
    """Studies of the patient that were read and released here by the same protocol, with the digest of their findings;
    also those from before a merge, under the former patient id."""
    found = []
    for job in store.jobs_of_patient(heard.names_of(study.patient.patient_id, study.patient.issuer)):
        if _may_be_prior(job, study, protocol) and _is_same(job, study, heard):
            findings = _FINDINGS.validate_json(artifacts.get(job.facts["findings"]))
            prior = PriorStudy(
                job.study_instance_uid,
                findings.study_date,
                findings.study_description,
                findings.accession_number,
                "own readings",
            )
            found.append((prior, str(job.facts["findings"])))
    return found


def _may_be_prior(job: StudyJob, study: Study, protocol: Protocol) -> bool:
    day = study.study_date.isoformat() if study.study_date else ""
    return (
        job.study_instance_uid != study.study_instance_uid
        and job.state != "rejected"
        and bool(job.facts.get("findings"))
        and job.protocol in ("", protocol.name)
        and (not day or job.study_date <= day)
    )


def _is_same(job: StudyJob, study: Study, heard: HearingStore) -> bool:
    one, other = (job.patient_id, job.patient_issuer), (study.patient.patient_id, study.patient.issuer)
    return heard.are_same_patient(one, other)


def load_findings(artifacts: ArtifactStore, digest: str, study: Study) -> Findings:
    """Findings of a prior, under the patient id that the patient has now: `find_own` has seen that both are one."""
    findings = _FINDINGS.validate_json(artifacts.get(digest))
    now = study.patient
    return replace(findings, patient=replace(findings.patient, patient_id=now.patient_id, issuer=now.issuer))


async def find_in_pacs(
    pacs: ImageArchive, patient_ids: Iterable[str], study: Study, protocol: Protocol
) -> list[PriorStudy]:
    """Earlier studies of the patient in the PACS that the protocol's `match` lets in. Raises as the connector does."""
    known: dict[str, dict[str, Any]] = {}
    for patient_id in patient_ids:
        for one in await pacs.search_studies({"PatientID": patient_id}, include=_INCLUDED):
            found = qido_to_study(one, ())
            # `*` in an id is a wildcard to the PACS, so what it answers is compared.
            if found.patient.patient_id == patient_id and _is_earlier(found, study):
                known[found.study_instance_uid] = one
    newest = sorted(known.values(), key=lambda one: (_day(qido_to_study(one, ())), str(one)), reverse=True)
    priors = []
    for one in newest[:MOST_CANDIDATES]:
        uid = qido_to_study(one, ()).study_instance_uid
        series = await pacs.search_series(uid, {}, include=("Modality", "SeriesDescription", "BodyPartExamined"))
        candidate = qido_to_study(one, series)
        if not match_protocol(candidate, protocol):
            priors.append(_to_prior(candidate, "pacs"))
    return priors


async def find_in_ehr(
    source: ContextSource, patient_reference: str, study: Study, protocol: Protocol
) -> list[PriorStudy]:
    """Earlier ImagingStudies of the patient in the EHR that the protocol's `match` lets in. Raises as the connector
    does."""
    references = frozenset({patient_reference})
    found = await source.search("ImagingStudy", {"patient": patient_reference, "_sort": "-started"}, limit=100)
    candidates = (imaging_study_to_study(one.get("resource", one), study.patient, references) for one in found)
    return [
        _to_prior(one, "ehr")
        for one in candidates
        if one is not None and _is_earlier(one, study) and not match_protocol(one, protocol)
    ]


def join_priors(
    own: Sequence[tuple[PriorStudy, str]], *others: Sequence[PriorStudy]
) -> tuple[tuple[PriorStudy, str], ...]:
    """Each study once, with the digest of its findings where they are known; our own memory tells most of it."""
    joined = {prior.study_instance_uid: (prior, digest) for prior, digest in own}
    for some in others:
        for prior in some:
            joined.setdefault(prior.study_instance_uid, (prior, ""))
    return tuple(joined.values())


def _is_earlier(candidate: Study, study: Study) -> bool:
    """Whether a study may be a prior: another one, not later, and of nobody else by issuer, birth date and sex."""
    if not candidate.study_instance_uid or candidate.study_instance_uid == study.study_instance_uid:
        return False
    if candidate.study_date and study.study_date and candidate.study_date > study.study_date:
        return False
    one, other = candidate.patient, study.patient
    pairs = ((one.issuer, other.issuer), (one.birth_date, other.birth_date), (one.sex, other.sex))
    return all(not a or not b or a == b for a, b in pairs)


def _day(study: Study) -> date:
    return study.study_date or date.min


def _to_prior(study: Study, found_in: FoundIn) -> PriorStudy:
    return PriorStudy(study.study_instance_uid, study.study_date, study.description, study.accession_number, found_in)
