"""The steps of `read_study`: one verb each, its retry policy beside it.

A step takes and gives references and small facts (JSON), never pixels. What a system may still do later is
tried again here, patiently; what ends the reading is raised as `Stopped`.
"""

import asyncio
import contextlib
import io
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
from pydantic import TypeAdapter

from connectors.errors import Ambiguous, ConnectorError, Permanent, Retryable
from mappings.inputs.fhir_to_context import latest_psa
from mappings.model.changes import PriorStudy
from mappings.model.context import ClinicalContext
from mappings.model.findings import Findings, ModelIdentity, RoleChoice
from mappings.model.protocol import Protocol
from mappings.model.revision import RevisionRefused
from mappings.model.study import Study
from mappings.reading.priors_to_findings import with_comparison
from mappings.reading.rerun_to_revision import merge_rerun, reports_the_same
from mappings.reading.tensors_to_findings import AnswerUnusable, Reading, check_answer, tensors_to_findings
from mappings.reading.volumes_to_tensors import volumes_to_tensors
from mappings.rules.result_status import find_report_refusal
from middleware import durable, telemetry
from middleware.errors import Stopped
from middleware.intake.context import read_chart, search_chart, search_identity
from middleware.intake.deciding import Decided, decide
from middleware.intake.identity import digest_identity, find_disagreements, find_heard_disagreements
from middleware.intake.images import RoleImages, load_roles, read_study
from middleware.intake.inbox import FIRST_LATE_LOOK, next_try_at, run_started_at, spool_name, workflow_id
from middleware.intake.priors import find_in_ehr, find_in_pacs, find_own, join_priors, load_findings
from middleware.intake.room import check_room
from middleware.ports import FetchedStudy
from middleware.release.corrections import find_own_report, with_own_report
from middleware.release.deliveries import PRIORITIES, ROUTINE, Errand, plan_deliveries
from middleware.release.rendering import Addresses, render_all
from middleware.release.validation import find_faults
from middleware.store.issuers import Issuers
from middleware.store.tables import ArtifactRecord, Delivery, StepRun, StudyJob
from middleware.systems import Systems
from middleware.turns import take_turn

_systems: Systems | None = None


def use(systems: Systems) -> None:
    """Let the steps act on these systems from now on. `bootstrap.py` calls this once a process."""
    global _systems
    _systems = systems
    _load_role_images.cache_clear()


def systems() -> Systems:
    """The systems in use."""
    if _systems is None:
        raise RuntimeError("steps.use() was not called")
    return _systems


Answer = TypeVar("Answer")


class Images(TypedDict):
    """Where a study lies in the spool."""

    folder: str
    instances: int
    bytes: int


class Route(TypedDict):
    """What is read of a study: the protocol, and digests of the study and role choices."""

    protocol: str
    study: str
    roles: str


class Answered(TypedDict):
    """The model's answer: digest of the arrays (npz) and who answered."""

    arrays: str
    name: str
    version: str


WAITS_FOR_MESSAGES = 60
"""Seconds that a release waits for messages to be applied."""


class Planned(TypedDict):
    """Where a result goes, and how urgent that is (1 first)."""

    destinations: list[str]
    priority: int


_STUDY = TypeAdapter(Study)
_ROLES = TypeAdapter(tuple[RoleChoice, ...])
_CONTEXT = TypeAdapter(ClinicalContext)
_DECIDED = TypeAdapter(Decided)
_FINDINGS = TypeAdapter(Findings)


@dataclass(frozen=True)
class Priors:
    """Earlier studies, each with the digest of its findings (empty: not known here); whether there was anywhere to
    look, and sentences about systems that did not answer."""

    found: tuple[tuple[PriorStudy, str], ...]
    was_searched: bool
    silent: tuple[str, ...] = ()


_PRIORS = TypeAdapter(Priors)


@asynccontextmanager
async def _run(step: str, job_id: str) -> AsyncIterator[telemetry.StepWatch]:
    """Time the step and remember the run, however it ends."""
    started = systems().now()
    outcome = "failed"
    watch = telemetry.StepWatch()
    try:
        with telemetry.watch_step(step, job_id) as watch:
            yield watch
        outcome = "done"
    except Stopped as stop:
        outcome = stop.state
        raise
    finally:
        run = StepRun(job_id=job_id, step=step, started_at=started, duration_s=watch.duration_s, outcome=outcome)
        systems().store.add_step_run(run)


async def _patiently(what: str, action: Callable[[], Awaitable[Answer]]) -> Answer:
    """Do `action`, again and again while it may still work; Stopped (failed) when it never will or time is up."""
    retry = systems().settings.retry
    for attempt in range(1, retry.attempts + 1):
        try:
            return await action()
        except Permanent as error:
            raise Stopped("failed", (f"{what}: {error}",)) from error
        except (Retryable, Ambiguous) as error:
            if attempt == retry.attempts:
                raise Stopped("failed", (f"{what}, given up after {attempt} attempts: {error}",)) from error
            telemetry.tell(telemetry.Progress(what, "waiting", str(error)))
            await asyncio.sleep(retry.wait_s(attempt, getattr(error, "retry_after_s", None)))
    raise AssertionError("unreachable")


def describe_fault(fault: BaseException) -> str:
    """A fault of our own in words: what kind and where, without its message, which may quote patient data."""
    last = traceback.extract_tb(fault.__traceback__)[-1:]
    where = f" in {Path(last[0].filename).name}, line {last[0].lineno}" if last else ""
    return f"unexpected {type(fault).__name__}{where}: a fault of Wetread's, please report it"


def _dump(adapter: TypeAdapter[Any], value: Any) -> str:
    return systems().artifacts.put(adapter.dump_json(value)).digest


def _load(adapter: TypeAdapter[Answer], digest: str) -> Answer:
    return adapter.validate_json(systems().artifacts.get(digest))


def _spool(job_id: str) -> Path:
    """This run's own folder: what an earlier run fetched, here or elsewhere, are other images."""
    return systems().settings.data_dir / "spool" / spool_name(systems().store.job(job_id))


# Images


@durable.step
async def fetch_images(job_id: str, study_uid: str) -> Images:
    """Fetch the whole study into the spool. Patient: a PACS may be down for a while, the disk may be full."""
    await durable.outlast(_check_room)
    async with _run("fetch", job_id) as watch:
        systems().store.update_job(job_id, systems().now(), state="reading")
        fetched = await _fetch(job_id, study_uid)
        watch.detail = f"{len(fetched.files)} instances, {fetched.bytes_received / 1e6:.1f} MB"
        return Images(folder=str(_spool(job_id)), instances=len(fetched.files), bytes=fetched.bytes_received)


async def _check_room() -> None:
    settings = systems().settings
    check_room(settings.data_dir, settings.storage.min_free_mib)


async def _fetch(job_id: str, study_uid: str) -> FetchedStudy:
    source = systems().images
    if source is None:
        raise Stopped("failed", ("no source of images is configured; set pacs in wetread.yaml",))
    into = _spool(job_id)
    into.parent.mkdir(parents=True, exist_ok=True)

    def report(instances: int, size: int) -> None:
        telemetry.tell(telemetry.Progress("fetch", "going on", f"{instances} instances, {size / 1e6:.1f} MB"))

    return await _patiently("fetching the images", lambda: source.fetch_study(study_uid, into, on_progress=report))


async def _spooled(job_id: str, study_uid: str) -> Path:
    """Where the study lies in this process' spool. The one that fetched it may have been another, on another machine,
    and what waits for long may have been removed: then it is fetched again."""
    folder = _spool(job_id)
    if not folder.is_dir():
        await _fetch(job_id, study_uid)
    return folder


@durable.step
async def choose_protocol(job_id: str, study_uid: str, images: Images, wanted: str) -> Route:
    """Read the headers, find the first protocol (or take the `wanted` one) that may read the study as far as images
    tell, and the series of its roles.

    Nothing to retry: the answer depends on the spool alone. Stops as unusable or unmatched, with every reason.
    """
    async with _run("route", job_id) as watch:
        study = await asyncio.to_thread(read_study, await _spooled(job_id, study_uid))
        if study.study_instance_uid != study_uid:
            raise Stopped("unusable", ("the images fetched belong to another study than the one asked for",))
        route = await _decide(job_id, study, None, wanted)
        watch.detail = f"protocol {route['protocol']}; " + ", ".join(
            f"{c.role}: series {c.series_label}" for c in _load(_ROLES, route["roles"]) if c.series_instance_uid
        )
        return route


def _whose(study: Study) -> dict[str, str]:
    day = study.study_date.isoformat() if study.study_date else ""
    return {
        "patient_id": study.patient.patient_id,
        "patient_issuer": study.patient.issuer,
        "study_date": day,
        "accession_number": study.accession_number,
    }


async def _decide(job_id: str, study: Study, context: ClinicalContext | None, wanted: str) -> Route:
    """What is read of the study, as far as is known with this context (None: not asked for yet). Every verdict is kept
    with the job, and the text of every protocol file. Stops where no protocol reads the study, with every reason."""
    here = systems()
    protocols = {wanted: here.protocols[wanted]} if wanted else here.protocols
    began = run_started_at(here.store.job(job_id))
    decided = await asyncio.to_thread(decide, study, context, protocols, began)
    texts = [here.artifacts.put(loaded.text.encode()).digest for loaded in protocols.values()]
    chosen = decided.find(decided.protocol)
    route = Route(
        protocol=decided.protocol, study=_dump(_STUDY, study), roles=_dump(_ROLES, chosen.roles) if chosen else ""
    )
    facts: dict[str, Any] = {"study": route["study"], "roles": route["roles"], "rules": _dump(_DECIDED, decided)}
    facts["texts"] = texts  # the protocol files as they were, for as long as the job is explained
    if context is None:
        facts["context"] = ""  # what is kept there is an earlier run's
    here.store.update_job(job_id, here.now(), protocol=decided.protocol, facts=facts, images=_whose(study))
    if decided.state in ("unmatched", "unusable"):
        raise Stopped(decided.state, decided.reasons)
    return route


# Context


@durable.step
async def gather_context(job_id: str, route: Route) -> str:
    """Pull patient, order, laboratory values and history from the EHR; the digest of the context.

    Patient: an EHR may be down for a while. What it does not have is named as missing.
    """
    async with _run("context", job_id) as watch:
        study = _load(_STUDY, route["study"])
        source = systems().context
        system = _identifier_system()
        found = await _patiently("asking the EHR", lambda: search_chart(source, study, system)) if source else []
        context = read_chart(found, study, _context_name(), systems().heard, _issuers())
        order = "order found" if context.order else "no order"
        patient = "patient found" if context.patient else "patient not found"
        told = f"{patient}, {order}, {len(context.labs)} labs"
        watch.detail = told if source else f"no EHR configured and no context given; {order} in messages"
        return _keep_context(job_id, context)


def _context_name() -> str | None:
    return systems().context_name if systems().context is not None else None


def _issuers() -> Issuers:
    return systems().settings.site.issuers


def _identifier_system() -> str:
    ehr = systems().settings.ehr
    return ehr.patient_identifier_system if ehr else ""


def _keep_context(job_id: str, context: ClinicalContext) -> str:
    digest = _dump(_CONTEXT, context)
    systems().store.update_job(job_id, systems().now(), facts={"context": digest})
    return digest


@durable.step
async def check_identity(job_id: str, route: Route, context: str) -> None:
    """Stop (held) where images, order and EHR do not speak of one patient, unless a person released the study in spite
    of just that. Nothing to retry."""
    async with _run("identity", job_id) as watch:
        study, known = _load(_STUDY, route["study"]), _load(_CONTEXT, context)
        disagreements = _find_disagreements(systems().store.job(job_id), study, known)
        accepted = _hold_unless_accepted(job_id, study, known, disagreements)
        watch.detail = f"released by {accepted}" if accepted else "; ".join(disagreements)
        watch.detail = watch.detail or "images, order and EHR agree"


def _find_disagreements(job: StudyJob, study: Study, context: ClinicalContext) -> tuple[str, ...]:
    here, issuers = systems(), _issuers()
    return (
        *find_disagreements(study, context, context_expected=here.context is not None, issuers=issuers),
        *find_heard_disagreements(study, here.heard, issuers),
        *_find_former_patient(job, study),
    )


def _find_former_patient(job: StudyJob, study: Study) -> tuple[str, ...]:
    """A result that went out for one patient is not followed by one for another without a person."""
    if "findings" not in job.facts:
        return ()
    former = _load(_FINDINGS, job.facts["findings"]).patient
    one, other = (former.patient_id, former.issuer), (study.patient.patient_id, study.patient.issuer)
    if systems().heard.are_same_patient(one, other):
        return ()
    return ("a result of this study was released for another patient before; correct that one first",)


def _hold_unless_accepted(
    job_id: str, study: Study, context: ClinicalContext, disagreements: tuple[str, ...], *, is_told: bool = True
) -> str:
    """Who released the study in spite of these disagreements; empty where there is nothing to hold for. Raises Stopped
    (held) for one that nobody accepted, or where images or EHR say something else now."""
    store, now = systems().store, systems().now()
    if not disagreements or (systems().context is None and not systems().configured()):
        store.update_job(job_id, now, facts={"released_despite": None})
        return ""
    identity = digest_identity(study, context, systems().heard, _issuers())
    accepted = store.job(job_id).facts.get("accepted", {})
    is_accepted = accepted.get("identity") == identity and set(disagreements) <= set(accepted["reasons"])
    if not is_accepted or not is_told:
        store.update_job(job_id, now, facts={"held_identity": identity})
        raise Stopped("held", disagreements)
    person = str(accepted["person"])
    store.update_job(job_id, now, facts={"released_despite": {"person": person, "reasons": list(disagreements)}})
    return person


@durable.step
async def apply_rules(job_id: str, route: Route, context: str, wanted: str) -> Route:
    """Decide with the context which protocol reads the study: the first one that lets it in. Stops as unmatched or
    unusable; every reason names the value that decided. Nothing to retry."""
    async with _run("rules", job_id) as watch:
        final = await _decide(job_id, _load(_STUDY, route["study"]), _load(_CONTEXT, context), wanted)
        loaded = systems().protocols[final["protocol"]]
        watch.detail = f"{len(loaded.when) + len(loaded.set_aside)} rules let the study in"
        if final["protocol"] != route["protocol"]:
            watch.detail += f", to be read by protocol {final['protocol']}"
        return final


# Priors


@durable.step
async def find_priors(job_id: str, route: Route, context: str) -> str:
    """Find earlier studies of the patient that the protocol would read, in our own memory, the PACS and the EHR; the
    digest of what was found. A system that does not answer is named in the result and stops nothing."""
    async with _run("priors", job_id) as watch:
        here, study = systems(), _load(_STUDY, route["study"])
        protocol, known = here.protocols[route["protocol"]].protocol, _load(_CONTEXT, context)
        own = await asyncio.to_thread(find_own, here.store, here.heard, here.artifacts, study, protocol, _issuers())
        silent: list[str] = []
        in_pacs, in_ehr = [], []
        if here.pacs is not None and study.patient.patient_id:
            names = await asyncio.to_thread(here.heard.names_of, study.patient.patient_id, study.patient.issuer)
            in_pacs = await _or_nothing(find_in_pacs(here.pacs, names, study, protocol, _issuers()), "PACS", silent)
        if here.context is not None and known.patient is not None:
            in_ehr = await _or_nothing(
                find_in_ehr(here.context, known.patient.reference, study, protocol), "EHR", silent
            )
        found = join_priors(own, in_pacs, in_ehr)
        was_searched = bool(own) or here.pacs is not None or known.patient is not None
        compared = sum(1 for _, digest in found if digest)
        watch.detail = (
            f"{len(found)} found, {compared} of them read here" if was_searched else "nowhere to look for them"
        )
        return _dump(_PRIORS, Priors(found, was_searched, tuple(silent)))


async def _or_nothing(search: Awaitable[list[PriorStudy]], system: str, silent: list[str]) -> list[PriorStudy]:
    try:
        return await search
    except ConnectorError as error:
        why = "its answer cannot be used" if isinstance(error, Permanent) else "it did not answer"
        silent.append(f"Priors were not looked for in the {system}: {why}.")
        return []


# Reading


_RoleImages = tuple[Protocol, Study, tuple[RoleChoice, ...], RoleImages]


async def _role_images(job_id: str, route: Route) -> _RoleImages:
    """The volumes of the protocol's roles. Three steps in a row need them, so the last few are kept in memory; a
    folder that was fetched again is another folder (its inode and time differ) and is read again."""
    folder = await _spooled(job_id, _load(_STUDY, route["study"]).study_instance_uid)
    told = folder.stat()
    which = (str(folder), told.st_ino, told.st_mtime_ns, route["protocol"], route["study"], route["roles"])
    return await asyncio.to_thread(_load_role_images, *which)


@lru_cache(maxsize=2)
def _load_role_images(
    folder: str, _inode: int, _mtime_ns: int, protocol_name: str, study_digest: str, roles_digest: str
) -> _RoleImages:
    protocol = systems().protocols[protocol_name].protocol
    study, roles = _load(_STUDY, study_digest), _load(_ROLES, roles_digest)
    return protocol, study, roles, load_roles(Path(folder), study, protocol, roles)


@durable.step
async def ask_model(job_id: str, images: Images, route: Route) -> Answered:
    """Resample to the reference grid, ask the pinned model, and keep its answer. Patient: inference has no side
    effect, and a server may be loading or full."""
    async with _run("inference", job_id) as watch:
        server = systems().model
        if server is None:
            raise Stopped("failed", ("no inference server is configured; set triton in wetread.yaml",))
        protocol, _, _, loaded = await _role_images(job_id, route)
        tensors = await asyncio.to_thread(volumes_to_tensors, loaded.volumes, protocol)
        await _patiently("asking the model", lambda: server.check_model(protocol.model))
        outputs = protocol.model.outputs
        async with take_turn(systems().workers, systems().settings.concurrent_inferences):
            answer = await _patiently(
                "asking the model", lambda: server.infer(protocol.model, tensors, outputs, request_id=job_id)
            )
        try:
            check_answer(answer.outputs, loaded.volumes[protocol.measure.reference_role].geometry.shape)
        except AnswerUnusable as error:
            raise Stopped("failed", (f"the model's answer cannot be used: {error}",)) from error
        watch.detail = f"{answer.model_name} version {answer.model_version}, {len(answer.outputs['scores'])} lesion(s)"
        digest = await asyncio.to_thread(_keep_arrays, answer.outputs)
        return Answered(arrays=digest, name=answer.model_name, version=answer.model_version)


def _keep_arrays(arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return systems().artifacts.put(buffer.getvalue()).digest


def _kept_arrays(digest: str) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(io.BytesIO(systems().artifacts.get(digest)), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


@durable.step
async def derive_findings(
    job_id: str, images: Images, route: Route, context: str, priors: str, answered: Answered
) -> str:
    """Measure, place and score everything the model drew, and compare it with the last prior; the digest of the
    findings. Nothing to retry."""
    async with _run("findings", job_id) as watch:
        loaded = await _role_images(job_id, route)
        findings = await asyncio.to_thread(_derive, job_id, loaded, context, priors, answered)
        facts: dict[str, Any] = {"answer": dict(answered), "derived": keep_findings(findings)}
        try:
            revision = _as_revision(findings, systems().store.job(job_id))
        except RevisionRefused as refusal:  # a person's result stands against it: they must look, and it waits for them
            held = {"held_reading": facts["derived"], "held_from": {"route": dict(route), "answered": dict(answered)}}
            systems().store.update_job(job_id, systems().now(), facts={**facts, **held})
            raise Stopped("held", (str(refusal),)) from refusal
        systems().store.update_job(job_id, systems().now(), facts={**facts, "held_reading": None})
        watch.detail = _summary(revision)
        return keep_findings(revision)


def _derive(
    job_id: str, role_images: _RoleImages, context_digest: str, priors_digest: str, answered: Answered
) -> Findings:
    protocol, study, roles, loaded = role_images
    context, priors = _load(_CONTEXT, context_digest), _load(_PRIORS, priors_digest)
    job = systems().store.job(job_id)
    began = run_started_at(job)
    on = study.study_date or began.date()
    psa, reason = latest_psa(context, on, protocol.measure.psa.maximum_age_days)
    model = ModelIdentity(
        answered["name"], answered["version"], protocol.model.manufacturer, protocol.model.description
    )
    reading = Reading(
        job_id=job_id,
        revision=1,
        now=began.astimezone(systems().settings.zone).replace(microsecond=0),
        study=study,
        protocol=protocol,
        model=model,
        context=context,
        psa=psa,
        psa_reason=reason,
        roles=roles,
        volumes=loaded.volumes,
        warnings=(*_released_warnings(job), *priors.silent),
    )
    findings = tensors_to_findings(_kept_arrays(answered["arrays"]), reading)
    if priors.was_searched:
        artifacts = systems().artifacts
        known = [(p, load_findings(artifacts, digest, study) if digest else None) for p, digest in priors.found]
        findings = with_comparison(findings, known)
    return with_own_report(findings, find_own_report(systems().heard, study))


def _released_warnings(job: StudyJob) -> tuple[str, ...]:
    """What a person released the study in spite of: whoever reads the draft must know."""
    despite = job.facts.get("released_despite") or {"person": "", "reasons": ()}
    return tuple(f"Released by {despite['person']} although {reason}." for reason in despite["reasons"])


def keep_findings(findings: Findings) -> str:
    """Keep findings; their digest."""
    return _dump(_FINDINGS, findings)


def _as_revision(findings: Findings, job: StudyJob) -> Findings:
    """The released findings themselves where the reading says nothing new, else the next revision after them. Raises
    RevisionRefused where a person's result stands against it."""
    if not job.facts.get("findings"):
        return findings
    released = _load(_FINDINGS, job.facts["findings"])
    last_read = _load(_FINDINGS, job.facts["read_findings"]) if job.facts.get("read_findings") else released
    if reports_the_same(last_read, findings):
        return released
    # Whose study it is was decided at the gates: a merge or a person may have given it another patient id since.
    return merge_rerun(replace(released, patient=findings.patient), findings, findings.created_at)


def _former_oru(job_id: str, result: Findings) -> bytes | None:
    """The RIS message of the revision that this one replaces, where there was one."""
    if result.predecessor_revision is None:
        return None
    records = systems().store.artifacts(job_id, result.predecessor_revision)
    digest = next((record.digest for record in records if record.name == "oru.hl7"), None)
    return systems().artifacts.get(digest) if digest else None


def _summary(findings: Findings) -> str:
    gland = findings.gland.measurement("volume_voxels") if findings.gland else None
    overall = f", PI-RADS {findings.assessments[0].score}" if findings.assessments else ""
    size = f"gland {gland.text} mL" if gland else "no gland"
    return f"{size}, {len(findings.lesions)} lesion(s){overall}"


# Release


@durable.step
async def render(job_id: str, images: Images, route: Route, answered: Answered, findings: str) -> list[str]:
    """Render everything the protocol asks for into the artifact store; the artifacts' names. Nothing to retry:
    the same findings give the same bytes."""
    async with _run("render", job_id) as watch:
        loaded = await _role_images(job_id, route)
        records = await asyncio.to_thread(_render, job_id, loaded, answered, findings)
        systems().store.save_artifacts(records)
        watch.detail = f"{len(records)} artifacts, {sum(r.size_bytes for r in records) / 1e6:.1f} MB"
        return [record.name for record in records]


def _addresses() -> Addresses:
    site, ris = systems().settings.site, systems().settings.ris
    return Addresses(
        sending_application=site.sending_application,
        sending_facility=site.sending_facility,
        receiving_application=ris.receiving_application if ris else "RIS",
        receiving_facility=ris.receiving_facility if ris else site.sending_facility,
        processing_id=ris.processing_id if ris else "P",
        zone=systems().settings.zone,
        ehr_gave_context=systems().context is systems().ehr,
    )


def _render(job_id: str, role_images: _RoleImages, answered: Answered, findings: str) -> list[ArtifactRecord]:
    protocol, _, _, loaded = role_images
    result = _load(_FINDINGS, findings)
    arrays = _kept_arrays(answered["arrays"])
    masks = {name: arrays[name] for name in ("gland", "zones", "lesions")}
    former = _former_oru(job_id, result)
    rendered = render_all(result, protocol, masks, loaded, systems().templates, _addresses(), former)
    return [
        ArtifactRecord(
            artifact_id=f"{job_id}/{result.revision}/{position:03}",
            job_id=job_id,
            revision=result.revision,
            name=artifact.name,
            kind=artifact.kind,
            media_type=artifact.media_type,
            digest=systems().artifacts.put(artifact.data).digest,
            size_bytes=len(artifact.data),
            sop_instance_uid=artifact.sop_instance_uid,
        )
        for position, artifact in enumerate(rendered)
    ]


@durable.step
async def validate(job_id: str, findings: str, answered: Answered) -> None:
    """Check every artifact against its standard and against the findings; stop (quarantined) at any fault."""
    async with _run("validate", job_id) as watch:
        result = _load(_FINDINGS, findings)
        records = systems().store.artifacts(job_id, result.revision)
        contents = {record.name: systems().artifacts.get(record.digest) for record in records}
        masks = _kept_arrays(answered["arrays"])
        former = _former_oru(job_id, result)
        faults = await asyncio.to_thread(find_faults, result, contents, masks, former)
        if faults:
            raise Stopped("quarantined", faults)
        watch.detail = f"{len(contents)} artifacts agree with the findings and their standards"


@durable.step
async def plan_release(job_id: str, route: Route, answered: Answered, findings: str) -> Planned:
    """Write down what goes where, and how urgently. From here on the result is released. A withdrawal needs no identity
    to agree: it may be why the result is withdrawn."""
    async with _run("release", job_id) as watch:
        protocol = systems().protocols[route["protocol"]].protocol
        study, result = _load(_STUDY, route["study"]), _load(_FINDINGS, findings)
        is_withdrawn = result.status == "entered-in-error"
        context = result.context if is_withdrawn else await _check_identity_again(job_id, study)
        store, now = systems().store, systems().now()
        revision = result.revision
        urgency = PRIORITIES.get(context.order.priority, ROUTINE) if context.order else ROUTINE
        errand = Errand(job_id, revision, study.accession_number or job_id, urgency)
        artifacts = store.artifacts(job_id, revision)
        planned = plan_deliveries(errand, protocol.outputs, systems().configured(), artifacts, now)
        _withhold_from_ris(planned, study, result)
        store.plan_deliveries(job_id, revision, planned, now)
        facts: dict[str, Any] = {
            "findings": findings,
            "released": {"route": dict(route), "answered": dict(answered)},
        }
        was = store.job(job_id).facts
        if not was.get(
            "change"
        ):  # what the model says, apart from what people make of it: the next is compared with it
            facts["read_findings"] = was.get("derived")
        store.update_job(job_id, now, revision=revision, facts=facts)
        destinations = list(dict.fromkeys(d.destination for d in planned))
        watch.detail = (
            f"{len(planned)} deliveries to {', '.join(destinations) or 'nowhere (no destination configured)'}"
        )
        return Planned(destinations=destinations, priority=urgency)


def _withhold_from_ris(planned: list[Delivery], study: Study, result: Findings) -> None:
    """Plan no message to a RIS that has the radiologist's own final report and would see its status go back; the
    delivery says why, and a person may send it all the same."""
    own = find_own_report(systems().heard, study)
    refusal = find_report_refusal(own.status, result.status) if own else ""
    for delivery in planned:
        if refusal and delivery.destination == "ris":
            delivery.state, delivery.reason = "dead", refusal


async def _apply_what_came() -> None:
    """Wait until the messages that were acknowledged so far are applied: a merge may be among them. Stops (failed, to
    be tried again) where they stay unapplied."""
    for _ in range(WAITS_FOR_MESSAGES):
        if not await asyncio.to_thread(systems().heard.pending, 1):
            return
        await asyncio.sleep(1.0)
    raise Stopped("failed", ("messages that came before this result could be released are not applied yet",))


async def _check_identity_again(job_id: str, study: Study) -> ClinicalContext:
    """The context as it is now; stop (held) where something was told about patient or order while the study was being
    read: a merge, a cancellation. An EHR that does not answer just now was asked before; it stops no destination."""
    here = systems()
    await _apply_what_came()
    job = here.store.job(job_id)
    context = _load(_CONTEXT, job.facts["context"])
    if here.context is not None:
        with contextlib.suppress(ConnectorError):
            found = await search_identity(here.context, study, _identifier_system())
            context = read_chart(found, study, _context_name(), here.heard, _issuers())
    disagreements = _find_disagreements(job, study, context)
    told = (job.facts.get("released_despite") or {"reasons": ()})["reasons"]
    # What the draft does not say is held even where a person has accepted it: read anew, the draft says it.
    _hold_unless_accepted(job_id, study, context, disagreements, is_told=set(disagreements) <= set(told))
    return context


def _next_look(state: str, failing_since: str, now: datetime) -> datetime | None:
    """When the study is looked at by itself: what failed is tried again, and where nobody tells of images that come
    after a reading, it is asked whether some did."""
    settings = systems().settings
    if state == "failed":
        return next_try_at(failing_since, now)
    is_told = settings.pacs_watch is not None or settings.orthanc_changes is not None
    return None if is_told or systems().pacs is None else now + FIRST_LATE_LOOK


@durable.step
async def conclude(job_id: str, workflow: str, state: str, reasons: list[str]) -> str:
    """Remember how this run ended; the id of the next run's workflow where an event came meanwhile, else empty."""
    store = systems().store
    if workflow_id(store.job(job_id)) != workflow:  # concluded before a restart; the next run is known already
        return workflow_id(store.job(job_id))
    now, before = systems().now(), store.job(job_id)
    since = (before.facts.get("failing_since") or now.isoformat()) if state == "failed" else ""
    # A change that failed since a system was away is made by the next try; any other end settles it.
    settled = {} if state == "failed" else {"change": ""}
    store.update_job(job_id, now, facts={"failing_since": since, **settled})
    look_at = None if before.facts.get("by_command") else _next_look(state, since, now)
    is_asked_again = store.conclude_job(job_id, now, state, reasons, look_at=look_at)
    telemetry.JOBS.labels(state).inc()
    telemetry.log("reading ended", job_id=job_id, state=state)
    return workflow_id(store.job(job_id)) if is_asked_again else ""
