"""What people do to findings: sign, change, reject; and what a revision knows of the one that it replaces.

Person names are written as DICOM writes them (PS3.5 6.2.1): `family^given^middle^prefix^suffix`.
"""

import re
from dataclasses import dataclass
from datetime import date, datetime
from typing import Literal

EditKind = Literal["accepted", "rejected", "measurement", "score", "psa", "text", "rerun"]
"""What a person did: a finding accepted or rejected; a measurement, an input of the scoring rule, the PSA in use or
the report's own words changed; another reading taken over in the place of the result."""


LONGEST_NAME = 64
PN_GROUPS, PN_COMPONENTS = 3, 5
_UNFIT = re.compile(r"[\\\x00-\x1f\x7f-\x9f]")


class RevisionRefused(ValueError):
    """A change that may not be made by itself; the message says why and what a person can do, without patient data."""


@dataclass(frozen=True)
class Signature:
    """Who stands behind a revision, for which organisation, since when (aware). `identifier` is the person's number
    at the site, empty where it is not known."""

    person: str
    organisation: str
    signed_at: datetime
    identifier: str = ""

    def __post_init__(self) -> None:
        check_person(self.person, "a signature")
        if not self.organisation.strip() or len(self.organisation) > LONGEST_NAME or _UNFIT.search(self.organisation):
            raise ValueError(
                f"a signature needs the organisation, in {LONGEST_NAME} characters without backslash or controls"
            )
        check_aware(self.signed_at, "a signature")


@dataclass(frozen=True)
class Edit:
    """One thing that a person did to one finding (`tracking_id`; empty for the PSA and the text), when and why.

    `key` names the measurement ("volume") or the input of the rule ("DWI score"), `value` is its new value as typed.
    `title`, `label`, `before` and `after` are filled in when the edit is made: what it was called and the values
    as every rendering shows them, with unit.
    """

    kind: EditKind
    person: str
    at: datetime
    tracking_id: str = ""
    key: str = ""
    value: str = ""
    reason: str = ""
    title: str = ""
    label: str = ""
    before: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        check_person(self.person, "an edit")
        check_aware(self.at, "an edit")


@dataclass(frozen=True)
class Rejection:
    """Who withdrew a whole result, when and why. `revision` is the revision that was withdrawn."""

    person: str
    at: datetime
    reason: str
    revision: int = 0

    def __post_init__(self) -> None:
        check_person(self.person, "a rejection")
        if not self.reason.strip():
            raise ValueError("a rejection needs a reason")
        check_aware(self.at, "a rejection")


@dataclass(frozen=True)
class Predecessor:
    """The released revision that this one replaces, as far as its DICOM objects must be named: whether it had a
    segmentation, whether its overview showed a gland, which lesions had key images; none for a withdrawn one."""

    revision: int
    segmented: bool
    overview: Literal["gland", "overview", ""]
    lesion_ids: tuple[str, ...]


@dataclass(frozen=True)
class OwnReport:
    """The radiologist's own report of the study, written without this result: HL7 table 0123 status (P, F or C) and
    when it was made."""

    status: Literal["P", "F", "C"]
    reported_at: datetime | None = None


@dataclass(frozen=True)
class ValueChange:
    """One value that differs between two revisions, as renderings show it; empty where there was or is none."""

    tracking_id: str
    key: str
    label: str
    before: str
    after: str


@dataclass(frozen=True)
class Difference:
    """What changed between two revisions of one result: findings by tracking id, values by tracking id and key. What
    holds for the whole study has the tracking id "study"."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[ValueChange, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    @property
    def only_adds(self) -> bool:
        """Whether everything that was said still stands."""
        return not self.removed and all(not change.before for change in self.changed)


def check_person(name: str, what: str) -> None:
    """Raise ValueError for a name that is empty or that DICOM could not hold (PS3.5 6.2.1)."""
    groups = name.split("=")
    fits = len(groups) <= PN_GROUPS and all(len(g) <= LONGEST_NAME and g.count("^") < PN_COMPONENTS for g in groups)
    if not name.strip("^ =") or not fits or _UNFIT.search(name):
        raise ValueError(
            f"{what} needs the person's name as family^given^middle^prefix^suffix, in {LONGEST_NAME} characters "
            "without backslash or controls"
        )


def check_aware(moment: datetime | date, what: str) -> None:
    """Raise ValueError for a time without its offset from UTC."""
    if not isinstance(moment, datetime) or moment.utcoffset() is None:
        raise ValueError(f"{what} needs a time with its offset from UTC")
