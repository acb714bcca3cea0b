"""What changed since a prior study: which lesion is which, and by how much each value grew.

Numbers are `Measurement`s, computed from the values as both studies show them, so that a reader's own sum agrees.
"""

from dataclasses import dataclass
from datetime import date
from typing import Literal

from mappings.model.codes import Code
from mappings.model.measurement import Evidence, Measurement
from mappings.model.study import Vector

ChangeStatus = Literal["matched", "new", "gone", "ambiguous"]

PERCENT = Code("%", "UCUM", "percent")
DAYS = Code("d", "UCUM", "day")
PERCENT_PER_YEAR = Code("%/a", "UCUM", "percent per year")
PER_YEAR = {
    "mL": Code("mL/a", "UCUM", "milliliter per year"),
    "mm": Code("mm/a", "UCUM", "millimeter per year"),
}
"""The unit of a yearly rate by the UCUM code of the quantity; `a` is UCUM's mean Julian year of 365.25 days."""

# PS3.16 codes none of these quantities; they are ours until it does.
DIFFERENCE = Code("difference-from-prior", "99WETREAD", "Difference from the prior study")
PERCENT_CHANGE = Code("percent-change-from-prior", "99WETREAD", "Percent change from the prior study")
YEARLY_RATE = Code("yearly-rate", "99WETREAD", "Rate of change per year")
DOUBLING_TIME = Code("volume-doubling-time", "99WETREAD", "Volume doubling time")
PRIOR_VALUE = Code("value-at-prior", "99WETREAD", "Value at the prior study")

STATUS_CODES: dict[ChangeStatus, Code] = {
    "matched": Code("matched", "99WETREAD", "Matched with a lesion of the prior study"),
    "new": Code("new", "99WETREAD", "Not in the prior study"),
    "gone": Code("gone", "99WETREAD", "In the prior study only"),
    "ambiguous": Code("ambiguous", "99WETREAD", "More than one match with the prior study"),
}


class PriorRefused(ValueError):
    """A study that may not be compared with the current one; the message says why, without patient data."""


@dataclass(frozen=True)
class LesionRef:
    """One lesion of one sitting: where its values come from. `evidence` is the slice that shows it."""

    study_instance_uid: str
    study_date: date
    job_id: str
    revision: int
    tracking_id: str
    tracking_uid: str
    title: str
    segment_number: int | None = None
    centroid_lps_mm: Vector | None = None
    evidence: tuple[Evidence, ...] = ()


@dataclass(frozen=True)
class Change:
    """One quantity at two sittings. `difference` has its unit, `percent` is of the prior value (None where that is
    0), `per_year` the difference spread evenly over the interval, `percent_per_year` the compound yearly growth;
    both are None where the interval is too short to extrapolate."""

    key: str
    label: str
    prior: Measurement
    current: Measurement
    difference: Measurement
    percent: Measurement | None = None
    per_year: Measurement | None = None
    percent_per_year: Measurement | None = None


@dataclass(frozen=True)
class LesionChange:
    """What became of one lesion.

    `matched` has `current` and `prior`, `new` only `current`, `gone` only `prior`. `ambiguous` has `current` and
    the `candidates` of the prior study between which the positions do not decide; it has no numbers.
    `distance_mm` is between the registered centroids. `notes` are sentences for the reader.
    """

    status: ChangeStatus
    interval_days: int
    current: LesionRef | None = None
    prior: LesionRef | None = None
    candidates: tuple[LesionRef, ...] = ()
    changes: tuple[Change, ...] = ()
    doubling_time: Measurement | None = None
    distance_mm: float | None = None
    notes: tuple[str, ...] = ()

    def change(self, key: str) -> Change | None:
        """The change of the measurement with this key, or None."""
        return next((c for c in self.changes if c.key == key), None)


@dataclass(frozen=True)
class Alignment:
    """Takes positions of the prior study to the current one: gland centroid onto gland centroid (LPS mm), distances
    from it multiplied by `scale`."""

    prior_centre_lps_mm: Vector
    current_centre_lps_mm: Vector
    scale: float
    notes: tuple[str, ...] = ()

    def __call__(self, point_lps_mm: Vector) -> Vector:
        """The same place of the gland at the current sitting."""
        pairs = zip(point_lps_mm, self.prior_centre_lps_mm, self.current_centre_lps_mm, strict=True)
        x, y, z = ((value - before) * self.scale + now for value, before, now in pairs)
        return (x, y, z)


@dataclass(frozen=True)
class Comparison:
    """The current study against one prior: the gland's changes, and every lesion of both studies once."""

    prior_study_instance_uid: str
    prior_study_date: date
    prior_job_id: str
    prior_revision: int
    prior_protocol_name: str
    interval_days: int
    gland: tuple[Change, ...]
    lesions: tuple[LesionChange, ...]
    notes: tuple[str, ...] = ()

    def lesion(self, tracking_id: str) -> LesionChange | None:
        """What became of the current lesion with this tracking id, or None."""
        return next((row for row in self.lesions if row.current and row.current.tracking_id == tracking_id), None)

    @property
    def gone(self) -> tuple[LesionRef, ...]:
        """The lesions of the prior that the current study has no counterpart of."""
        return tuple(row.prior for row in self.lesions if row.status == "gone" and row.prior)


FoundIn = Literal["pacs", "own readings", "ehr"]


@dataclass(frozen=True)
class PriorStudy:
    """One prior study that was found: where, and in `outcome` what became of it ("compared", or why it was not)."""

    study_instance_uid: str
    study_date: date | None
    description: str
    accession_number: str
    found_in: FoundIn
    outcome: str = ""
