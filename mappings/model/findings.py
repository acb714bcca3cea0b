"""The one findings model: every rendering (SR, SEG, ORU, FHIR, draft, key image) is a function of it.

What was measured is in `measurement.py`, what changed since a prior study in `changes.py`, what people did to it
in `revision.py`.
"""

from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Literal

from mappings.model.changes import Comparison, PriorStudy
from mappings.model.codes import Code
from mappings.model.context import ClinicalContext, ContextValue
from mappings.model.measurement import Evidence, Measurement
from mappings.model.revision import Edit, OwnReport, Predecessor, Rejection, Signature
from mappings.model.study import PatientIdentity, Vector

Status = Literal["preliminary", "final", "amended", "corrected", "entered-in-error"]
Level = Literal["base", "mid", "apex"]


@dataclass(frozen=True)
class AssessmentInput:
    """One input of a rule: its name, its value in words ("4", "not acquired"), and its code if coded."""

    name: str
    value: str
    concept: Code | None = None
    code: Code | None = None


@dataclass(frozen=True)
class Assessment:
    """A category that a rule gave: `value` codes it, `score` is its short form ("4", "X"), `inputs` are what
    the rule looked at, `explanation` says in one sentence how the table led there, `rule` names the table."""

    key: str
    label: str
    concept: Code
    value: Code
    score: str
    rule: str
    inputs: tuple[AssessmentInput, ...]
    explanation: str


@dataclass(frozen=True)
class Finding:
    """One thing found. `segment_number` is its segment in the SEG; `label` its label in the model's mask."""

    tracking_id: str
    tracking_uid: str
    kind: Code
    site: Code
    title: str
    segment_number: int | None = None
    label: int | None = None
    laterality: Code | None = None
    zone: Code | None = None
    level: Level | None = None
    sector: Code | None = None
    centroid_lps_mm: Vector | None = None
    measurements: tuple[Measurement, ...] = ()
    assessments: tuple[Assessment, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    confidence: float | None = None
    notes: tuple[str, ...] = ()

    def measurement(self, key: str) -> Measurement | None:
        """The measurement with this key, or None."""
        return next((m for m in self.measurements if m.key == key), None)

    def assessment(self, key: str) -> Assessment | None:
        """The assessment with this key, or None."""
        return next((a for a in self.assessments if a.key == key), None)


@dataclass(frozen=True)
class Segment:
    """One segment of the SEG: which mask of the model (`gland`, `zones`, `lesions`) and which label of it."""

    number: int
    name: str
    mask: Literal["gland", "zones", "lesions"]
    label: int
    category: Code
    type: Code
    tracking_id: str
    tracking_uid: str


@dataclass(frozen=True)
class ModelIdentity:
    """Which model answered: name and version as Triton reports them, and who stands behind it."""

    name: str
    version: str
    manufacturer: str
    description: str = ""


@dataclass(frozen=True)
class Dropped:
    """A finding that a former revision reported and this one does not. `revision` is the first one without it, `model`
    what had proposed it, `person` who rejected it (empty where a re-run did not find it again)."""

    finding: Finding
    model: ModelIdentity
    revision: int
    why: Literal["rejected", "not found again"]
    person: str = ""
    at: datetime | None = None
    reason: str = ""


@dataclass(frozen=True)
class RoleChoice:
    """Which series plays a role and why each candidate was chosen or refused (one sentence each)."""

    role: str
    title: str
    required: bool
    series_instance_uid: str | None
    series_label: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Blank:
    """An input or value that is missing, left blank on purpose, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Findings:
    """Everything Wetread says about one study under one protocol, at one revision.

    `created_at` is aware. `psa` is the value used for the PSA density, None where none may be used.
    `assessments` hold for the whole study (the overall category). `procedure` codes what was done, as the
    protocol names it. `comparison` is with one of `priors`; `priors_searched` tells "no prior study was found"
    from "nobody looked".

    What people did: `signature` is of the person who stands behind this revision, `edits` all that people changed over
    the revisions, oldest first, `report_text` the report in the signing person's own words. `dropped` are findings and
    `blank_assessments` categories of former revisions that this one no longer gives: systems that got them must
    be told. `predecessor` says more of the revision that this one replaces, `own_report` that the radiologist's own
    report of the study is there.
    """

    job_id: str
    revision: int
    status: Status
    created_at: datetime
    study_instance_uid: str
    accession_number: str
    study_date: date | None
    study_description: str
    patient: PatientIdentity
    protocol_name: str
    protocol_version: str
    protocol_title: str
    model: ModelIdentity
    context: ClinicalContext
    roles: tuple[RoleChoice, ...]
    findings: tuple[Finding, ...]
    segments: tuple[Segment, ...]
    assessments: tuple[Assessment, ...] = ()
    psa: ContextValue | None = None
    blanks: tuple[Blank, ...] = ()
    technique: tuple[str, ...] = ()
    patient_age: str = ""
    predecessor_revision: int | None = None
    reference_frame_uid: str = ""
    procedure: Code | None = None
    warnings: tuple[str, ...] = field(default=())
    comparison: Comparison | None = None
    priors: tuple[PriorStudy, ...] = ()
    priors_searched: bool = False
    signature: Signature | None = None
    edits: tuple[Edit, ...] = ()
    report_text: str = ""
    rejection: Rejection | None = None
    dropped: tuple[Dropped, ...] = ()
    blank_assessments: tuple[Assessment, ...] = ()
    predecessor: Predecessor | None = None
    own_report: OwnReport | None = None

    @property
    def gland(self) -> Finding | None:
        """The organ finding, if the model found it."""
        return next((f for f in self.findings if f.tracking_id == "gland"), None)

    @property
    def lesions(self) -> tuple[Finding, ...]:
        """The lesion findings, in the model's order of labels."""
        return tuple(f for f in self.findings if f.label is not None and f.tracking_id.startswith("lesion"))
