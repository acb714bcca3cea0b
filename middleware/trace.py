"""Where a result came from, as one JSON document: inputs, choices, model, steps, artifacts, deliveries."""

import json
from importlib.metadata import version
from typing import Any

from middleware.store.tables import Delivery
from middleware.systems import Systems


def build_trace(systems: Systems, job_id: str) -> dict[str, Any]:
    """Everything that lets a stranger follow one result back to its inputs and on to its destinations."""
    store = systems.store
    job = store.job(job_id)
    loaded = systems.protocols.get(job.protocol)
    return {
        "wetread_version": version("wetread"),
        "job_id": job.job_id,
        "revision": job.revision,
        "study_instance_uid": job.study_instance_uid,
        "state": job.state,
        "reasons": job.reasons,
        "events": [
            {"source": e.source, "key": e.idempotency_key, "received_at": e.received_at.isoformat()}
            for e in store.events_of_job(job_id)
        ],
        "decisions": [
            {"action": d.action, "person": d.person, "reason": d.reason, "decided_at": d.decided_at.isoformat()}
            for d in store.decisions(job_id)
        ],
        "protocol": {
            "name": job.protocol,
            "version": loaded.protocol.version if loaded else "",
            "sha256": loaded.digest if loaded else "",
        },
        "model": job.facts.get("answer"),
        "roles": _kept_json(systems, job.facts.get("roles")),
        "inputs": _inputs(systems, job.facts),
        "steps": [
            {
                "step": run.step,
                "started_at": run.started_at.isoformat(),
                "duration_s": round(run.duration_s, 3),
                "outcome": run.outcome,
            }
            for run in store.step_runs(job_id)
        ],
        "artifacts": [
            {"name": a.name, "sha256": a.digest, "size_bytes": a.size_bytes, "sop_instance_uid": a.sop_instance_uid}
            for a in store.artifacts(job_id, job.revision)
        ],
        "deliveries": [show_delivery(d) for d in store.deliveries(job_id=job_id)],
    }


def _kept_json(systems: Systems, digest: str | None) -> Any:
    return json.loads(systems.artifacts.get(digest)) if digest else None


def _inputs(systems: Systems, facts: dict[str, Any]) -> dict[str, Any]:
    """Every instance that was read by series, and the context's sources; digests of both as kept."""
    study = _kept_json(systems, facts.get("study")) or {"series": []}
    context = _kept_json(systems, facts.get("context")) or {}
    references = [lab["reference"] for lab in context.get("labs", [])]
    references += [context[key]["reference"] for key in ("patient", "order") if context.get(key)]
    return {
        "study_sha256": facts.get("study"),
        "context_sha256": facts.get("context"),
        "context_references": references,
        "series": [
            {
                "series_instance_uid": s["series_instance_uid"],
                "instances": [i["sop_instance_uid"] for i in s["instances"]],
            }
            for s in study["series"]
        ],
    }


def show_delivery(delivery: Delivery) -> dict[str, Any]:
    """A delivery without its database columns."""
    return {
        "delivery_id": delivery.delivery_id,
        "destination": delivery.destination,
        "artifact": delivery.artifact_name,
        "state": delivery.state,
        "attempts": delivery.attempts,
        "receipt": delivery.receipt,
        "reason": delivery.reason,
    }
