"""When a study that arrives is to be read: as soon as what a protocol requires is there and stable, or somebody who
knows says that it is complete; a timer is only the fallback.

Pure of clocks and systems: what was seen and when comes in, what to do next goes out.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from mappings.model.findings import RoleChoice
from mappings.model.protocol import Protocol
from mappings.model.study import Instance, Series, Study
from mappings.reading.series_to_roles import NON_IMAGE_MODALITIES, STUDY_ATTRIBUTES, choose_series, failed
from middleware.intake.deciding import Decided, decide
from middleware.intake.protocols import LoadedProtocol

Protocols = Mapping[str, LoadedProtocol]

NOTHING_CAME = timedelta(days=7)
"""So long a study that was announced is waited for."""
SLOWEST_LOOK = timedelta(minutes=10)


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds (see `CompletenessSettings`)."""

    quiet_s: float
    longest_wait_s: float
    look_every_s: float


@dataclass(frozen=True)
class Told:
    """What is known of a study besides its images: the order (or the PACS) says that it is complete; the order is on
    hold."""

    is_complete: bool = False
    is_on_hold: bool = False


@dataclass(frozen=True)
class Sight:
    """What one look at a study found: digests of all its images and of those that a protocol requires (empty where
    there are none, or not all); in sentences what is missing or why no protocol applies; the verdicts, where the
    headers were looked at."""

    images: str = ""
    required: str = ""
    applies: bool = False
    reasons: tuple[str, ...] = ()
    decided: Decided | None = None


@dataclass(frozen=True)
class Verdict:
    """What to do: read the study, wait until `look_at`, or conclude without fetching it. `marks` are to be given to
    the next look."""

    action: Literal["read", "wait", "unmatched", "unusable"]
    reasons: tuple[str, ...]
    marks: Mapping[str, Any] = field(default_factory=dict)
    look_at: datetime | None = None


def see_study(study: Study | None, protocols: Protocols, now: datetime) -> Sight:
    """What the headers of a study (None: the PACS has nothing of it) say about how complete it is."""
    images = digest_images(study) if study else ""
    if study is None or not images:
        return Sight(reasons=("no images of it are in the PACS yet",))
    if refused := refused_modalities(study, protocols):
        return Sight(images, reasons=refused)
    decided = decide(study, None, protocols, now)
    if decided.state == "unmatched":
        return Sight(images, reasons=decided.reasons, decided=decided)
    supposed, reading = study, decided
    if decided.state == "unusable":
        supposed = _suppose_b_values(study)
        reading = decide(supposed, None, protocols, now)
    if reading.state == "unusable":
        reasons = tuple(f"{decided.protocol}: {reason}" for reason in decided.reasons)
        return Sight(images, applies=True, reasons=reasons)
    considered = reading.find(reading.protocol)
    required = [role for role in considered.roles if role.required] if considered else []
    return Sight(images, _digest(list_role_instances(supposed, required)), True)


def see_outline(study: Study | None, why_no_headers: str) -> Sight:
    """What the search of its series alone says about a study: that it changes or not."""
    images = digest_images(study) if study else ""
    if not images:
        return Sight(reasons=("no images of it are in the PACS yet",))
    return Sight(images, applies=True, reasons=(f"its headers cannot be looked at: {why_no_headers}",))


def refused_modalities(study: Study, protocols: Protocols) -> tuple[str, ...]:
    """Why the modalities alone rule out every protocol; empty where one may apply, which its headers will tell."""
    modalities = STUDY_ATTRIBUTES["modality"](study)
    reasons = []
    for name, loaded in protocols.items():
        conditions = [condition for condition in loaded.protocol.match if condition.attribute == "modality"]
        refusals = [why for one in conditions if (why := failed(one, lambda _: modalities)) is not None]
        if not refusals:
            return ()
        reasons.append(f"{name}: {'; '.join(refusals)}")
    return tuple(reasons)


def digest_images(study: Study) -> str:
    """One word for all images of a study; our own results (SEG, SR, captures) are none. Empty without images."""
    pairs = [
        (series.series_instance_uid, instance.sop_instance_uid)
        for series in study.series
        if series.modality not in NON_IMAGE_MODALITIES
        for instance in series.instances
    ]
    return _digest(pairs) if pairs else ""


def count_images(study: Study) -> dict[str, int]:
    """How many instances each series of images has, also where only an outline of the study is known."""
    return {
        series.series_instance_uid: _count(series)
        for series in study.series
        if series.modality not in NON_IMAGE_MODALITIES
    }


def _count(series: Series) -> int:
    """An outline has one instance, whose UID is `0.` and the number that it stands for (headers.py)."""
    first = series.instances[0].sop_instance_uid if series.instances else ""
    return int(first.removeprefix("0.") or 0) if first.startswith("0.") else len(series.instances)


def changes_roles(before: Study, now: Study, protocol: Protocol) -> bool:
    """Whether the study as its headers are now has other instances in the protocol's roles than it had when it was
    read. A b-value that the headers do not give is the one that was read or, of a new series, supposed to be high: one
    reading too many finds the same, one too few misses a series."""
    read = {i.sop_instance_uid: i.b_value_s_mm2 for series in before.series for i in series.instances}
    filled = _with_b_values(now, lambda series, i: read.get(i.sop_instance_uid, i.b_value_s_mm2))
    was = sorted(list_role_instances(before, choose_series(before, protocol)))
    supposed = _suppose_b_values(filled, frozenset(read))
    return any(sorted(list_role_instances(one, choose_series(one, protocol))) != was for one in (filled, supposed))


SUPPOSED_B_VALUE_S_MM2 = 1000.0


def _suppose_b_values(study: Study, read: frozenset[str] = frozenset()) -> Study:
    """The study with a high b-value for every series that states none, except for instances that were read: some
    PACS leave private elements out of headers, and with them the b-values of older scanners."""

    def suppose(series: Series, instance: Instance) -> float | None:
        is_stated = any(i.b_value_s_mm2 is not None for i in series.instances)
        return instance.b_value_s_mm2 if is_stated or instance.sop_instance_uid in read else SUPPOSED_B_VALUE_S_MM2

    return _with_b_values(study, suppose)


def _with_b_values(study: Study, b_value: Callable[[Series, Instance], float | None]) -> Study:
    series = (
        replace(one, instances=tuple(replace(i, b_value_s_mm2=b_value(one, i)) for i in one.instances))
        for one in study.series
    )
    return replace(study, series=tuple(series))


def list_role_instances(study: Study, roles: Sequence[RoleChoice]) -> list[tuple[str, str]]:
    """Role and SOP Instance UID of every instance that plays a role."""
    return [
        (choice.role, instance.sop_instance_uid)
        for choice in roles
        if choice.series_instance_uid
        for instance in study.find_series(choice.series_instance_uid).instances
    ]


def _digest(pairs: Sequence[tuple[str, str]]) -> str:
    return hashlib.sha256(repr(sorted(pairs)).encode()).hexdigest()


def judge(sight: Sight, told: Told, marks: Mapping[str, Any], patience: Patience, now: datetime) -> Verdict:
    """What to do about a study that waits, by what is there now and since when. `marks` are those of the last look,
    empty at the first."""
    marks = _marked(sight, marks, now)
    plan = _plan(sight, told, marks, patience)
    if plan.due_at is not None and now >= plan.due_at:
        return Verdict(plan.action, plan.reasons, marks)
    since_change = now - datetime.fromisoformat(marks["images_at"])
    pause = min(max(since_change / 5, timedelta(seconds=patience.look_every_s)), SLOWEST_LOOK)
    return Verdict("wait", plan.reasons, marks, min(now + pause, plan.due_at or now + pause))


def _marked(sight: Sight, marks: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    """The marks with what changed since the last look; each `_at` is when its digest was first seen."""
    at = now.isoformat()
    kept = {"heard_at": at, **marks}
    for name, digest in (("images", sight.images), ("required", sight.required)):
        if kept.get(name) != digest:
            kept[name], kept[f"{name}_at"] = digest, at
    return kept


@dataclass(frozen=True)
class _Plan:
    """What will be done at `due_at` (None: not by itself) unless something changes, and what is waited for."""

    due_at: datetime | None
    action: Literal["read", "unmatched", "unusable"]
    reasons: tuple[str, ...]


def _plan(sight: Sight, told: Told, marks: Mapping[str, Any], patience: Patience) -> _Plan:
    at = {name: datetime.fromisoformat(marks[f"{name}_at"]) for name in ("heard", "images", "required")}
    if told.is_on_hold:
        return _Plan(None, "read", ("the order is on hold",))
    if not sight.images:
        return _Plan(at["heard"] + NOTHING_CAME, "unusable", sight.reasons)
    if sight.required:
        # Who says that all is there may say so while the PACS still receives it: one more look must find the same.
        quiet_s = min(patience.look_every_s, patience.quiet_s) if told.is_complete else patience.quiet_s
        reasons = ("everything required is there; it is read once no more of it comes",)
        return _Plan(at["required"] + timedelta(seconds=quiet_s), "read", reasons)
    wait_s = patience.quiet_s if told.is_complete else patience.longest_wait_s
    return _Plan(at["images"] + timedelta(seconds=wait_s), "read" if sight.applies else "unmatched", sight.reasons)
