"""Earlier studies of the patient that the protocol would read too: in our own memory, the PACS and the EHR."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from pydantic import TypeAdapter
from pydicom.config import IGNORE
from pydicom.uid import UID

from mappings.inputs.fhir_elements import as_dict
from mappings.inputs.imaging_studies_to_studies import imaging_study_to_study, modalities_in_study, qido_to_study
from mappings.model.changes import FoundIn, PriorStudy
from mappings.model.findings import Findings
from mappings.model.protocol import Protocol
from mappings.model.study import Study
from mappings.reading.series_to_roles import failed, match_protocol
from middleware import telemetry
from middleware.ports import ContextSource, ImageArchive
from middleware.store.artifacts import ArtifactStore
from middleware.store.hearing import HearingStore
from middleware.store.issuers import Issuers, may_be_same_issuer
from middleware.store.queries import Store
from middleware.store.tables import StudyJob

Answer = dict[str, Any]
"""DICOM JSON of one study."""
MOST_CANDIDATES = 20
"""The newest studies of a patient whose series are looked at; older ones are not compared anyway."""
_FINDINGS = TypeAdapter(Findings)
_STUDY = TypeAdapter(Study)
_INCLUDED = ("ModalitiesInStudy", "StudyDescription", "IssuerOfPatientID", "PatientBirthDate", "PatientSex")


def find_own(
    store: Store,
    heard: HearingStore,
    artifacts: ArtifactStore,
    study: Study,
    protocol: Protocol,
    issuers: Issuers = (),
) -> list[tuple[PriorStudy, str]]:
    """Studies of the patient that were read and released here by the same protocol, with the digest of their findings;
    also those from before a merge, under the former patient id."""
    found = []
    for job in store.jobs_of_patient(heard.names_of(study.patient.patient_id, study.patient.issuer)):
        if not _may_be_prior(job, study, protocol):
            continue
        read, findings = _kept(artifacts, job)
        if read is not None and findings is not None and _is_earlier_of_same(read, findings, study, heard, issuers):
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


def _kept(artifacts: ArtifactStore, job: StudyJob) -> tuple[Study | None, Findings | None]:
    """A study as it was read and its released findings; None where they were lost or kept by another version, which
    is no reason to stop the reading of a later study."""
    try:
        study = _STUDY.validate_json(artifacts.get(str(job.facts.get("study", ""))))
        return study, _FINDINGS.validate_json(artifacts.get(str(job.facts["findings"])))
    except (OSError, ValueError) as error:
        telemetry.log("prior not read", job_id=job.job_id, kind=type(error).__name__)
        return None, None


def _is_earlier_of_same(read: Study, findings: Findings, study: Study, heard: HearingStore, issuers: Issuers) -> bool:
    """Whether images and released findings both are of the patient: they differ where somebody has corrected the
    images since. A patient id from before a merge may be of another issuer."""
    mine = study.patient
    names = {(one.patient_id, one.issuer) for one in (read.patient, findings.patient)}
    if not all(heard.are_same_patient(name, (mine.patient_id, mine.issuer)) for name in names):
        return False
    return all(
        is_earlier(replace(read, patient=replace(patient, issuer=mine.issuer)), study, issuers)
        for patient in (read.patient, findings.patient)
    )


def load_findings(artifacts: ArtifactStore, digest: str, study: Study) -> Findings:
    """Findings of a prior, under the patient id that the patient has now: `find_own` has seen that both are one."""
    findings = _FINDINGS.validate_json(artifacts.get(digest))
    now = study.patient
    return replace(findings, patient=replace(findings.patient, patient_id=now.patient_id, issuer=now.issuer))


async def find_in_pacs(
    pacs: ImageArchive, patient_ids: Iterable[str], study: Study, protocol: Protocol, issuers: Issuers = ()
) -> list[PriorStudy]:
    """Earlier studies of the patient in the PACS that the protocol's `match` lets in. Raises as the connector does."""
    known: dict[str, tuple[Study, Answer]] = {}
    for patient_id in patient_ids:
        for one in await pacs.search_studies({"PatientID": patient_id}, include=_INCLUDED):
            found = qido_to_study(one, ())
            # `*` in an id is a wildcard to the PACS, so what it answers is compared.
            is_theirs = found.patient.patient_id == patient_id
            if is_theirs and is_earlier(found, study, issuers) and _may_match(one, protocol):
                known[found.study_instance_uid] = found, one
    newest = sorted(known.values(), key=lambda pair: (_moment(pair[0]), pair[0].study_instance_uid), reverse=True)
    priors = []
    for found, one in newest[:MOST_CANDIDATES]:
        series = await pacs.search_series(
            found.study_instance_uid, {}, include=("Modality", "SeriesDescription", "BodyPartExamined")
        )
        candidate = qido_to_study(one, series)
        if not match_protocol(candidate, protocol):
            priors.append(_to_prior(candidate, "pacs"))
    return priors


def _may_match(answer: Answer, protocol: Protocol) -> bool:
    """Whether the modalities that the PACS names for the study let it in; where it names none, its series tell."""
    modalities = modalities_in_study(answer)
    conditions = [condition for condition in protocol.match if condition.attribute == "modality"]
    return not modalities or all(failed(condition, lambda _: modalities) is None for condition in conditions)


async def find_in_ehr(
    source: ContextSource, patient_reference: str, study: Study, protocol: Protocol
) -> list[PriorStudy]:
    """Earlier ImagingStudies of the patient in the EHR that the protocol's `match` lets in. Raises as the connector
    does."""
    references = frozenset({patient_reference})
    found = await source.search("ImagingStudy", {"patient": patient_reference, "_sort": "-started"}, limit=100)
    candidates = (imaging_study_to_study(as_dict(one.get("resource", one)), study.patient, references) for one in found)
    return [
        _to_prior(one, "ehr")
        for one in candidates
        if one is not None and is_earlier(one, study) and not match_protocol(one, protocol)
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


def is_earlier(candidate: Study, study: Study, issuers: Issuers = ()) -> bool:
    """Whether a study may be a prior: another one, not later, and of nobody else by issuer, birth date and sex."""
    if (
        not UID(candidate.study_instance_uid, IGNORE).is_valid
        or candidate.study_instance_uid == study.study_instance_uid
    ):
        return False
    if candidate.study_date and study.study_date and _moment(candidate, study) > _moment(study, candidate):
        return False
    one, other = candidate.patient, study.patient
    pairs = ((one.birth_date, other.birth_date), (one.sex, other.sex))
    agrees = all(not a or not b or a == b for a, b in pairs)
    return agrees and may_be_same_issuer(one.issuer, other.issuer, issuers)


def _moment(study: Study, other: Study | None = None) -> tuple[date, str]:
    """Date and time of the study to the second; without the time where that of the `other` is not stated."""
    is_timed = bool(study.study_time) and (other is None or bool(other.study_time))
    time = study.study_time.replace(":", "").partition(".")[0].ljust(6, "0") if is_timed else ""
    return study.study_date or date.min, time


def _to_prior(study: Study, found_in: FoundIn) -> PriorStudy:
    return PriorStudy(study.study_instance_uid, study.study_date, study.description, study.accession_number, found_in)
