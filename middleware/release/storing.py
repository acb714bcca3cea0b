"""DICOM out: one instance to the PACS by STOW-RS, and what QIDO-RS shows of it afterwards.

A PACS that says "stored" may index late, may have coerced the instance, or may keep another one that came under the
same UID before: only what it shows counts as delivered.
"""

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from io import BytesIO
from typing import Any

import pydicom
from pydicom.datadict import dictionary_description, tag_for_keyword
from pydicom.dataset import Dataset

from connectors.errors import Ambiguous, Permanent, Retryable
from middleware.ports import ImageArchive, StoreOutcome
from middleware.release.deliveries import Outcome, not_now

COMPARED = ("SOPClassUID", "SeriesInstanceUID", "Modality", "ContentDate", "ContentTime", "InstanceNumber")
"""What tells two instances of one UID apart; none of it is coerced to fit a patient or an order."""
LOOKS_S = (0.0, 0.2, 0.5, 1.0, 2.0)
"""Waits before each look for an instance that was just stored."""
ALREADY_THERE = 0x0111


@dataclass(frozen=True)
class _Look:
    """What QIDO-RS shows of an instance: whether it is there, and the attributes in which that one differs; or why it
    cannot tell."""

    is_there: bool = False
    differing: tuple[str, ...] = ()
    unknown: str = ""
    failure: Outcome | None = None


async def send_to_pacs(
    pacs: ImageArchive, data: bytes, study_uid: str, *, is_first: bool, waited: timedelta, confirm_within: timedelta
) -> Outcome:
    """STOW one instance and have it confirmed by QIDO-RS. Sending it again is harmless: it keeps its SOP Instance UID;
    but what an earlier attempt brought there (`is_first` is false) is not sent again. What the PACS said it stored and
    does not show is `retrying`, and ambiguous once that has `waited` for longer than `confirm_within`."""
    sent = pydicom.dcmread(BytesIO(data), stop_before_pixels=True)
    if not is_first:
        look = await _look_for(pacs, sent, study_uid)
        if look.is_there or look.failure:
            return _judge(look, f"had {sent.SOPInstanceUID} already; it was not sent again", late=False)
    try:
        stored = (await pacs.store([data], study_uid))[0]
    except (Retryable, Ambiguous) as error:
        return not_now(error)
    except Permanent as error:
        return Outcome("dead", reason=str(error))
    if not stored.stored and not _may_be_there(stored):
        return _refused(stored)
    look = await _confirm(pacs, sent, study_uid, patient=stored.stored)
    if not stored.stored and not look.is_there:
        return _refused(stored)
    said = "stored" if stored.stored else f"has ({stored.reason})"
    warning = f", with a warning: {stored.warning}" if stored.warning else ""
    return _judge(look, f"{said} {sent.SOPInstanceUID}{warning}", late=waited > confirm_within)


def _may_be_there(stored: StoreOutcome) -> bool:
    """The PACS refused it as a duplicate, or did not mention it at all."""
    return stored.code == ALREADY_THERE or stored.code is None


def _refused(stored: StoreOutcome) -> Outcome:
    reason = f"refused by the PACS: {stored.reason}"
    return Outcome("retrying" if stored.retryable else "dead", reason=reason, answered=not stored.retryable)


def _judge(look: _Look, said: str, *, late: bool) -> Outcome:
    if look.failure:
        return look.failure
    if look.unknown:
        return Outcome("delivered", receipt=f"{said}; QIDO-RS cannot confirm it: {look.unknown}")
    if look.differing:
        what = ", ".join(look.differing)
        reason = f"the PACS has another instance under this UID (other {what}); look there and remove the wrong one"
        return Outcome("dead", reason=reason)
    if look.is_there:
        return Outcome("delivered", receipt=f"{said}; found by QIDO-RS")
    reason = f"the PACS {said}, but QIDO-RS does not find it"
    return Outcome("ambiguous" if late else "retrying", reason=reason, uncertain=True)


async def _confirm(pacs: ImageArchive, sent: Dataset, study_uid: str, *, patient: bool) -> _Look:
    look = _Look()
    for wait_s in LOOKS_S if patient else LOOKS_S[:1]:
        await asyncio.sleep(wait_s)
        look = await _look_for(pacs, sent, study_uid)
        if look.is_there or look.unknown or look.failure:
            break
    return look


async def _look_for(pacs: ImageArchive, sent: Dataset, study_uid: str) -> _Look:
    uid = str(sent.SOPInstanceUID)
    try:
        found = await pacs.search_instances(study_uid, {"SOPInstanceUID": uid}, include=COMPARED)
    except (Retryable, Ambiguous) as error:
        return _Look(failure=not_now(error, uncertain=True))
    except Permanent as error:  # a PACS without QIDO-RS, or one that does not let us search
        return _Look(unknown=str(error))
    mine = [each for each in found if _value(each, "SOPInstanceUID") == uid]
    if not mine:
        return _Look()
    return _Look(True, tuple(dictionary_description(k) for k in COMPARED if _differs(sent, mine[0], k)))


def _value(shown: dict[str, Any], keyword: str) -> str:
    values = shown.get(f"{tag_for_keyword(keyword):08X}", {}).get("Value") or [""]
    return str(values[0])


def _differs(sent: Dataset, shown: dict[str, Any], keyword: str) -> bool:
    """Whether the PACS shows another value; what it does not show says nothing."""
    there, ours = _value(shown, keyword), str(sent.get(keyword) or "")
    if keyword == "ContentTime":
        there, ours = _time(there), _time(ours)
    return bool(there) and bool(ours) and there != ours


def _time(value: str) -> str:
    """A DICOM TM without colons and fraction, which some archives drop."""
    return value.replace(":", "").partition(".")[0]
