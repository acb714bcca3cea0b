"""The model's answer to `Findings`: every measurement, place and category of one study.

`check_answer` first proves that the answer can be read at all; a wrong answer is refused, never repaired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mappings.model import codes
from mappings.model.codes import Code
from mappings.model.context import ClinicalContext, ContextValue
from mappings.model.findings import Assessment, Blank, Finding, Findings, ModelIdentity, RoleChoice, Segment
from mappings.model.ids import derive_uid
from mappings.model.measurement import Evidence, Measurement
from mappings.model.protocol import Protocol
from mappings.model.study import Geometry, Study, Volume
from mappings.reading.masks_to_measures import (
    Mask,
    centroid_lps_mm,
    extents,
    longest_diameter_3d_mm,
    longest_diameter_in_plane_mm,
    volume_ml,
)
from mappings.reading.masks_to_place import ZONES, find_place, find_zone
from mappings.rules import pirads_v2_1
from mappings.rules.pirads_v2_1 import Dce, Zone

Answer = Mapping[str, npt.NDArray[Any]]
"""The model's output tensors by name: gland, zones, lesions `(z, y, x)` and scores `(n, 4)`."""

ANATOMY = Code("123037004", "SCT", "Anatomical Structure")
ABNORMALITY = Code("49755003", "SCT", "Morphologically Abnormal Structure")
CREDIBLE_ADC_UM2_S = (200.0, 4000.0)
"""A median outside this range (1e-6 mm2/s) means another unit or a broken map; free water is near 3000."""


class AnswerUnusable(ValueError):
    """The model's answer contradicts itself or its contract; the message names how."""


@dataclass(frozen=True)
class Reading:
    """Everything that goes into the findings of one study besides the model's answer."""

    job_id: str
    revision: int
    now: datetime
    study: Study
    protocol: Protocol
    model: ModelIdentity
    context: ClinicalContext
    psa: ContextValue | None
    psa_reason: str
    roles: tuple[RoleChoice, ...]
    volumes: Mapping[str, Volume]
    warnings: tuple[str, ...] = ()

    @property
    def reference(self) -> Volume:
        """The volume on whose grid the answer lies."""
        return self.volumes[self.protocol.measure.reference_role]

    @property
    def grid(self) -> Geometry:
        """The grid of the answer's arrays."""
        return self.reference.geometry


def check_answer(answer: Answer, shape: tuple[int, int, int]) -> None:
    """Raise AnswerUnusable unless masks and scores obey the contract and agree with each other."""
    for name, highest in (("gland", 1), ("zones", 2)):
        if answer[name].shape != shape:
            raise AnswerUnusable(f"{name} has shape {answer[name].shape}, not {shape}")
        if answer[name].max(initial=0) > highest:
            raise AnswerUnusable(f"{name} holds the label {answer[name].max()}; the highest is {highest}")
    if answer["lesions"].shape != shape:
        raise AnswerUnusable(f"lesions has shape {answer['lesions'].shape}, not {shape}")
    scores = answer["scores"]
    if scores.ndim != 2 or scores.shape[1] != 4:
        raise AnswerUnusable(f"scores has shape {scores.shape}, not (n, 4)")
    labels = np.unique(answer["lesions"])
    labels = labels[labels > 0]
    if len(labels) != len(scores) or (len(labels) and int(labels.max()) != len(scores)):
        raise AnswerUnusable(f"lesions holds the labels {labels.tolist()} but scores has {len(scores)} rows")
    for row, (t2w, dwi, dce, confidence) in enumerate(scores, start=1):
        _check_row(row, float(t2w), float(dwi), float(dce), float(confidence))


def _check_row(row: int, t2w: float, dwi: float, dce: float, confidence: float) -> None:
    for name, value in (("T2W", t2w), ("DWI", dwi)):
        if value not in (1, 2, 3, 4, 5):
            raise AnswerUnusable(f"scores row {row}: {name} score {value:g} is not one of 1 to 5")
    if not np.isnan(dce) and dce not in (0, 1):
        raise AnswerUnusable(f"scores row {row}: DCE {dce:g} is not 0, 1 or NaN")
    if not 0 <= confidence <= 1:
        raise AnswerUnusable(f"scores row {row}: confidence {confidence:g} is not between 0 and 1")


def tensors_to_findings(answer: Answer, reading: Reading) -> Findings:
    """All findings of one study at one revision. Raises AnswerUnusable for an answer outside its contract."""
    check_answer(answer, reading.grid.shape)
    blanks: list[Blank] = []
    gland = _gland(answer["gland"] > 0, reading, blanks)
    lesions = [_lesion(label, answer, reading, blanks) for label in range(1, len(answer["scores"]) + 1)]
    categories = [a for lesion in lesions if (a := lesion.assessment("pirads"))]
    overall = pirads_v2_1.assess_study(categories)
    if overall is None:
        blanks.append(Blank("PI-RADS overall category", "the model proposes no lesion; the category is yours to give"))
    blanks.extend(_context_blanks(reading))
    return Findings(
        job_id=reading.job_id,
        revision=reading.revision,
        status="preliminary",
        created_at=reading.now,
        study_instance_uid=reading.study.study_instance_uid,
        accession_number=reading.study.accession_number,
        study_date=reading.study.study_date,
        study_description=reading.study.description,
        patient=reading.study.patient,
        protocol_name=reading.protocol.name,
        protocol_version=reading.protocol.version,
        protocol_title=reading.protocol.title,
        model=reading.model,
        context=reading.context,
        roles=reading.roles,
        findings=(*((gland,) if gland else ()), *lesions),
        segments=_segments(answer, gland, lesions, reading),
        assessments=(overall,) if overall else (),
        psa=reading.psa,
        blanks=tuple(blanks),
        technique=_technique(reading),
        patient_age=reading.study.patient_age,
        reference_frame_uid=reading.grid.frame_of_reference_uid,
        procedure=reading.protocol.procedure,
        warnings=reading.warnings,
    )


def _tracking_uid(reading: Reading, tracking_id: str) -> str:
    return derive_uid(reading.job_id, "finding", tracking_id)


def _gland(mask: Mask, reading: Reading, blanks: list[Blank]) -> Finding | None:
    if not mask.any():
        blanks.append(Blank("Prostate gland", "the model found no gland; volumes, PSA density and sides are left out"))
        return None
    size = extents(mask, reading.grid)
    voxels_ml = volume_ml(mask, reading.grid)
    measurements = [
        Measurement(
            "volume_voxels", "Volume by voxel count", codes.VOLUME, voxels_ml, codes.ML, 1, codes.SEGMENTED_VOXELS
        ),
        Measurement(
            "volume_ellipsoid", "Volume by ellipsoid", codes.VOLUME, size.ellipsoid_ml, codes.ML, 1, codes.ELLIPSOID
        ),
        Measurement("diameter_transverse", "Transverse diameter", codes.WIDTH, size.transverse_mm, codes.MM, 1),
        Measurement("diameter_ap", "Anteroposterior diameter", codes.HEIGHT, size.anteroposterior_mm, codes.MM, 1),
        Measurement("diameter_si", "Craniocaudal length", codes.LENGTH, size.craniocaudal_mm, codes.MM, 1),
    ]
    shown_ml = {"voxels": round(voxels_ml, 1), "ellipsoid": round(size.ellipsoid_ml, 1)}
    density = _psa_density(reading, shown_ml, blanks)
    return Finding(
        tracking_id="gland",
        tracking_uid=_tracking_uid(reading, "gland"),
        kind=codes.ORGAN,
        site=codes.PROSTATE,
        title="Prostate gland",
        segment_number=1,
        label=1,
        centroid_lps_mm=_rounded(centroid_lps_mm(mask, reading.grid)),
        measurements=tuple(_round(m) for m in [*measurements, *density]),
        evidence=_evidence(mask, reading),
    )


def _psa_density(reading: Reading, volumes_ml: Mapping[str, float], blanks: list[Blank]) -> list[Measurement]:
    """PSA (ng/mL) over the gland volume (mL) as shown, so that a reader's own division agrees; the protocol says
    which volume. PI-RADS v2.1, section on PSA density."""
    if reading.psa is None:
        blanks.append(Blank("PSA density", reading.psa_reason))
        return []
    kind = reading.protocol.measure.psa.volume
    method = codes.ELLIPSOID if kind == "ellipsoid" else codes.SEGMENTED_VOXELS
    if not volumes_ml[kind]:
        blanks.append(Blank("PSA density", "the gland that the model drew has no volume to divide by"))
        return []
    value = reading.psa.value / volumes_ml[kind]
    label = f"PSA density (volume by {'ellipsoid' if kind == 'ellipsoid' else 'voxel count'})"
    return [Measurement("psa_density", label, codes.PSA_DENSITY, value, codes.NG_ML_ML, 2, method)]


def _lesion(label: int, answer: Answer, reading: Reading, blanks: list[Blank]) -> Finding:
    mask = answer["lesions"] == label
    gland = answer["gland"] > 0
    tracking_id = f"lesion-{label}"
    zone, notes = find_zone(mask, answer["zones"])
    place = find_place(mask, gland, answer["zones"], zone, reading.grid)
    if place is None:
        blanks.append(Blank(f"{tracking_id} side, level and sector", "no gland to place it in"))
    measurements = _lesion_measurements(mask, reading, blanks, tracking_id)
    assessment = _assess(answer["scores"][label - 1], zone, blanks, tracking_id)
    diameter = next(_round(m).value for m in measurements if m.key == "diameter_in_plane")
    notes.extend(n for n in (pirads_v2_1.size_note(assessment.score, diameter),) if n)
    notes.extend(n for n in (_coverage_note(mask, reading),) if n)
    if gland.any() and not (mask & gland).any():
        notes.append("Lies outside the gland that the model drew. Please check.")
    return Finding(
        tracking_id=tracking_id,
        tracking_uid=_tracking_uid(reading, tracking_id),
        kind=codes.LESION,
        site=codes.PROSTATE,
        title=f"Lesion {label}",
        segment_number=_first_lesion_segment(answer) + label - 1,
        label=label,
        laterality=place.laterality if place else None,
        zone=ZONES[1 if zone == "PZ" else 2][1] if zone else None,
        level=place.level if place else None,
        sector=place.sector if place else None,
        centroid_lps_mm=_rounded(centroid_lps_mm(mask, reading.grid)),
        measurements=tuple(_round(m) for m in measurements),
        assessments=(assessment,),
        evidence=_evidence(mask, reading),
        confidence=round(float(answer["scores"][label - 1][3]), 2),
        notes=tuple(notes),
    )


def _lesion_measurements(mask: Mask, reading: Reading, blanks: list[Blank], tracking_id: str) -> list[Measurement]:
    grid = reading.grid
    sizes = [
        Measurement("volume", "Volume", codes.VOLUME, volume_ml(mask, grid), codes.ML, 2, codes.SEGMENTED_VOXELS),
        Measurement(
            "diameter_in_plane",
            "Longest diameter in plane",
            codes.LONGEST_DIAMETER_IN_PLANE,
            longest_diameter_in_plane_mm(mask, grid),
            codes.MM,
            1,
        ),
        Measurement(
            "diameter_3d",
            "Longest diameter in 3D",
            codes.LONGEST_DIAMETER_3D,
            longest_diameter_3d_mm(mask, grid),
            codes.MM,
            1,
        ),
    ]
    return [*sizes, *_adc_measurements(mask, reading, blanks, tracking_id)]


def _adc_measurements(mask: Mask, reading: Reading, blanks: list[Blank], tracking_id: str) -> list[Measurement]:
    volume = reading.volumes.get(reading.protocol.measure.adc_role)
    if volume is None:
        blanks.append(Blank(f"{tracking_id} ADC", "no ADC map in the study"))
        return []
    values = volume.array[mask]
    values = values[np.isfinite(values)]
    low, high = CREDIBLE_ADC_UM2_S
    if values.size == 0:
        blanks.append(Blank(f"{tracking_id} ADC", "lies outside the ADC map's field of view"))
        return []
    if not low <= float(np.median(values)) <= high:
        blanks.append(
            Blank(f"{tracking_id} ADC", "the map's values are not credible in 1e-6 mm2/s; its unit is unclear")
        )
        return []
    tenth = float(np.percentile(values, 10))
    return [
        Measurement("adc_mean", "Mean ADC", codes.ADC, float(values.mean()), codes.ADC_UNIT, 0, None, codes.MEAN),
        Measurement(
            "adc_p10", "10th percentile ADC", codes.ADC, tenth, codes.ADC_UNIT, 0, None, codes.TENTH_PERCENTILE
        ),
    ]


def _coverage_note(mask: Mask, reading: Reading) -> str | None:
    """A sentence where the ADC map reaches only a part of the lesion, so that its values stand for that part."""
    volume = reading.volumes.get(reading.protocol.measure.adc_role)
    share = float(np.isfinite(volume.array[mask]).mean()) if volume is not None else 0.0
    return f"ADC was measured on {share:.0%} of it; the map does not reach the rest." if 0 < share < 1 else None


def _assess(scores: npt.NDArray[Any], zone: Zone | None, blanks: list[Blank], tracking_id: str) -> Assessment:
    dce: Dce = "not acquired" if np.isnan(scores[2]) else "positive" if scores[2] == 1 else "negative"
    assessment = pirads_v2_1.assess_lesion(zone, int(scores[0]), int(scores[1]), dce)
    if assessment.score == "X":
        blanks.append(Blank(f"{tracking_id} PI-RADS category", assessment.explanation))
    return assessment


def _evidence(mask: Mask, reading: Reading) -> tuple[Evidence, ...]:
    """The reference slice on which the mask is largest."""
    reference = reading.reference
    frame = int(np.argmax(mask.sum(axis=(1, 2))))
    role = reading.protocol.measure.reference_role
    return (Evidence(role, reference.series_instance_uid, reference.sop_instance_uids[frame], frame),)


def _first_lesion_segment(answer: Answer) -> int:
    present = [(answer["gland"] > 0).any(), *((answer["zones"] == n).any() for n in ZONES)]
    return 1 + sum(bool(p) for p in present)


def _segments(
    answer: Answer, gland: Finding | None, lesions: Sequence[Finding], reading: Reading
) -> tuple[Segment, ...]:
    """Gland, zones and lesions that have voxels, numbered without gaps as PS3.3 C.8.20.2 asks."""
    rows: list[tuple[str, Literal["gland", "zones", "lesions"], int, Code, Code, str]] = []
    if gland:
        rows.append(("Prostate gland", "gland", 1, ANATOMY, codes.PROSTATE, "gland"))
    for number, (short, code) in ZONES.items():
        if (answer["zones"] == number).any():
            rows.append((code.meaning, "zones", number, ANATOMY, code, f"zone-{short.lower()}"))
    rows += [(f.title, "lesions", f.label or 0, ABNORMALITY, codes.LESION, f.tracking_id) for f in lesions]
    return tuple(
        Segment(number, name, mask, label, category, kind, tracking_id, _tracking_uid(reading, tracking_id))
        for number, (name, mask, label, category, kind, tracking_id) in enumerate(rows, start=1)
    )


def _context_blanks(reading: Reading) -> list[Blank]:
    absent = [
        Blank(choice.title, "no suitable series in the study")
        for choice in reading.roles
        if choice.series_instance_uid is None
    ]
    missing = [Blank("Clinical context", text) for text in reading.context.missing]
    return [*absent, *missing]


def _technique(reading: Reading) -> tuple[str, ...]:
    """One line for each series that was read; roles without one are among the blanks."""
    lines = []
    for choice in reading.roles:
        if choice.series_instance_uid is None:
            continue
        series = reading.study.find_series(choice.series_instance_uid)
        thickness = f", {series.slice_thickness_mm:g} mm" if series.slice_thickness_mm else ""
        b_values = sorted({i.b_value_s_mm2 for i in series.instances if i.b_value_s_mm2 is not None})
        b_text = f", b {b_values[-1]:g} s/mm2" if b_values and choice.role == "hbv" else ""
        notes = "".join(f"; {n}" for n in reading.volumes[choice.role].notes) if choice.role in reading.volumes else ""
        lines.append(
            f"{choice.title}: series {choice.series_label}, {len(series.instances)} slices{thickness}{b_text}{notes}"
        )
    return tuple(lines)


def _round(measurement: Measurement) -> Measurement:
    """The value as it is shown: rounded once, so that no rendering can round it differently."""
    return replace(measurement, value=round(measurement.value, measurement.decimals))


def _rounded(position: tuple[float, float, float]) -> tuple[float, float, float]:
    x, y, z = (round(v, 1) for v in position)
    return (x, y, z)
