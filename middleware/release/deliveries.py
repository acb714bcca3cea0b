"""Deliveries: one artifact to one destination, each with its own durable state, told truthfully.

pending > in_flight > delivered | retrying | ambiguous | dead. Only a positive answer of the destination makes
a delivery `delivered`; "sent, no answer" is `ambiguous` unless the destination drops duplicates.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from connectors.errors import Ambiguous, Permanent, Retryable
from mappings.model.ids import derive_control_id, derive_uuid
from mappings.model.protocol import Outputs
from middleware.ports import Ehr, Ris
from middleware.store.tables import ArtifactRecord, Delivery

DESTINATIONS = ("pacs", "ehr", "ris")


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended: the delivery's next state, the destination's answer, or why it is not delivered.
    `retry_after_s` is the destination's own wish; `uncertain` says that the destination may have acted; `answered`
    whether it answered at all (None: the attempt says nothing of it); `answer` is what it said in its own words, where
    that explains the outcome. It may hold patient data."""

    state: str
    receipt: str = ""
    reason: str = ""
    retry_after_s: float | None = None
    uncertain: bool = False
    answer: bytes = b""
    answered: bool | None = True


def not_now(error: Retryable | Ambiguous, state: str = "retrying", *, uncertain: bool = False) -> Outcome:
    """The outcome of an attempt that the destination did not answer, or answered with "not now"."""
    wait_s = getattr(error, "retry_after_s", None)
    return Outcome(
        state, reason=str(error), retry_after_s=wait_s, uncertain=uncertain, answered=False, answer=error.answer
    )


PRIORITIES = {"stat": 1, "asap": 2, "urgent": 3}
"""FHIR request-priority to what a queue takes first; routine and unknown come last."""
ROUTINE = 4


@dataclass(frozen=True)
class Errand:
    """Whose results go out: the job's revision, what they are ordered by at a destination (the accession number; the
    job where images state none), and how urgent they are (1 first)."""

    job_id: str
    revision: int
    order_key: str
    priority: int = ROUTINE


def plan_deliveries(
    errand: Errand,
    outputs: Outputs,
    configured: Sequence[str],
    artifacts: Sequence[ArtifactRecord],
    now: datetime,
) -> list[Delivery]:
    """One delivery for each artifact that the protocol sends to a configured destination, in artifact order."""
    planned = []
    for destination in DESTINATIONS:
        kinds = getattr(outputs, destination) if destination in configured else ()
        for position, artifact in enumerate(a for a in artifacts if a.kind in kinds):
            planned.append(
                Delivery(
                    delivery_id=str(derive_uuid(errand.job_id, errand.revision, destination, artifact.name)),
                    job_id=errand.job_id,
                    revision=errand.revision,
                    destination=destination,
                    artifact_name=artifact.name,
                    kind=artifact.kind,
                    digest=artifact.digest,
                    position=position,
                    order_key=errand.order_key,
                    priority=errand.priority,
                    created_at=now,
                    updated_at=now,
                )
            )
    return planned


async def send_to_ehr(ehr: Ehr, data: bytes) -> Outcome:
    """Run the transaction. Sending it again is harmless: every entry is conditional on a derived identifier."""
    try:
        answer = await ehr.transaction(json.loads(data))
    except (Retryable, Ambiguous) as error:
        return not_now(error)
    except Permanent as error:
        return Outcome("dead", reason=str(error), answer=error.answer)
    entries = [entry.get("response", {}) for entry in answer.get("entry", [])]
    stored = ", ".join(location for entry in entries if (location := entry.get("location", "")))
    warned = any(issue.get("severity") in ("error", "warning") for entry in entries for issue in _issues(entry))
    return Outcome("delivered", receipt=stored[:2000], answer=json.dumps(answer).encode() if warned else b"")


def _issues(response: dict[str, Any]) -> list[dict[str, Any]]:
    """The issues of the OperationOutcome that came with one entry of a transaction-response."""
    issues = (response.get("outcome") or {}).get("issue")
    return [issue for issue in issues if isinstance(issue, dict)] if isinstance(issues, list) else []


async def send_to_ris(ris: Ris, data: bytes, control_id: str, *, duplicate_safe: bool, resent: bool) -> Outcome:
    """Send one HL7 message and wait for its own acknowledgement.

    `resent` says that an earlier attempt may have reached the RIS (the process died while it was in flight):
    then only a RIS that drops duplicates by MSH-10 gets it again.
    """
    if resent and not duplicate_safe:
        reason = "the process ended while this was being sent; look in the RIS whether it arrived, then retry or close"
        return Outcome("ambiguous", reason=reason, answered=None)
    try:
        answer = await ris.send(data, control_id)
    except Retryable as error:
        return not_now(error)
    except Ambiguous as error:
        return not_now(error, "retrying" if duplicate_safe else "ambiguous", uncertain=True)
    except Permanent as error:
        return Outcome("dead", reason=str(error))
    return Outcome("delivered", receipt=f"{answer.code} for {control_id}")


def oru_control_id(delivery: Delivery) -> str:
    """MSH-10 of the ORU of a delivery, as its rendering derived it."""
    return derive_control_id(delivery.job_id, delivery.revision, "oru")


def give_up(outcome: Outcome, attempts: int) -> Outcome:
    """What a delivery becomes when it was tried in vain for too long: dead, or ambiguous if it may have arrived."""
    state = "ambiguous" if outcome.uncertain else "dead"
    return replace(outcome, state=state, reason=f"given up after {attempts} attempts: {outcome.reason}")
