"""Model nouns with believable values for tests of the renderings; all synthetic."""

from datetime import UTC, date, datetime

import numpy as np
import numpy.typing as npt

from mappings.model import codes
from mappings.model.codes import Code
from mappings.model.context import (
    ClinicalContext,
    ContextNote,
    ContextOrder,
    ContextPatient,
    ContextValue,
    Identifier,
)
from mappings.model.findings import (
    Assessment,
    AssessmentInput,
    Blank,
    Finding,
    Findings,
    ModelIdentity,
    RoleChoice,
    Segment,
)
from mappings.model.ids import derive_uid
from mappings.model.measurement import Evidence, Measurement
from mappings.model.study import PatientIdentity

NOW = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)
STUDY_UID = derive_uid("test-study")
T2W_UID = derive_uid("test-study", "t2w")
FRAME_UID = derive_uid("test-study", "frame")


def build_context(**changes: object) -> ClinicalContext:
    """Context of one patient with an order and a PSA."""
    values: dict[str, object] = {
        "source": "ehr",
        "patient": ContextPatient(
            reference="Patient/p1",
            identifiers=(Identifier("TEST-001", "urn:oid:1.2.3.4.5", "MR"),),
            name="Phantom^Peter",
            birth_date=date(1961, 5, 6),
            gender="male",
        ),
        "order": ContextOrder(
            reference="ServiceRequest/s1",
            accession_number="ACC-1",
            placer_order_number="PLAC-1",
            filler_order_number="FILL-1",
            code=Code("36389-5", "LN", "MR Prostate"),
            code_system_url="http://loinc.org",
            patient_reference="Patient/p1",
            reason="Elevated PSA",
            requester="Dr R Ferrer",
            priority="routine",
            status="active",
        ),
        "labs": (ContextValue(codes.PSA, 13.0, "ng/mL", datetime(2026, 2, 1, 8, tzinfo=UTC), "Observation/psa1"),),
        "notes": (ContextNote("condition", "Benign prostatic hyperplasia", "Condition/c1", date(2024, 1, 1)),),
    }
    return ClinicalContext(**{**values, **changes})  # type: ignore[arg-type]


def build_lesion(number: int = 1, side: Code = codes.RIGHT, score: str = "4") -> Finding:
    """One peripheral zone lesion with every measurement; its centroid's slice is frame 5."""
    right = side == codes.RIGHT
    category = {
        "2": Code("RID50297", "RADLEX", "PI-RADS 2 - Low (lesion)"),
        "4": Code("RID50299", "RADLEX", "PI-RADS 4 - High (lesion)"),
        "5": Code("RID50300", "RADLEX", "PI-RADS 5 - Very high (lesion)"),
    }[score]
    dwi = {"2": "RID50315", "4": "RID50317", "5": "RID50318"}[score]
    t2w = {"2": "RID50303", "4": "RID50305", "5": "RID50306"}[score]
    return Finding(
        tracking_id=f"lesion-{number}",
        tracking_uid=derive_uid("test-job", "finding", f"lesion-{number}"),
        kind=codes.LESION,
        site=codes.PROSTATE,
        title=f"Lesion {number}",
        segment_number=3 + number,
        label=number,
        laterality=side,
        zone=codes.PERIPHERAL_ZONE,
        level="mid",
        sector=Code("716921007", "SCT", "Right posterolateral middle peripheral zone of prostate")
        if right
        else Code("716922000", "SCT", "Left posterolateral middle peripheral zone of prostate"),
        centroid_lps_mm=(-10.0 if right else 10.0, 20.5, -3.25),
        measurements=(
            Measurement("volume", "Volume", codes.VOLUME, 0.31, codes.ML, 2, codes.SEGMENTED_VOXELS),
            Measurement(
                "diameter_in_plane",
                "Longest diameter in plane",
                codes.LONGEST_DIAMETER_IN_PLANE,
                9.5,
                codes.MM,
                1,
            ),
            Measurement("diameter_3d", "Longest diameter in 3D", codes.LONGEST_DIAMETER_3D, 12.1, codes.MM, 1),
            Measurement("adc_mean", "Mean ADC", codes.ADC, 812.0, codes.ADC_UNIT, 0, None, codes.MEAN),
            Measurement(
                "adc_p10",
                "10th percentile ADC",
                codes.ADC,
                640.0,
                codes.ADC_UNIT,
                0,
                None,
                codes.TENTH_PERCENTILE,
            ),
        ),
        assessments=(
            Assessment(
                key="pirads",
                label="PI-RADS v2.1 category",
                concept=codes.PIRADS_LESION,
                value=category,
                score=score,
                rule="pirads_v2_1",
                inputs=(
                    AssessmentInput("zone", "peripheral zone", None, codes.PERIPHERAL_ZONE),
                    AssessmentInput(
                        "T2W score",
                        score,
                        codes.PIRADS_T2WI,
                        Code(t2w, "RADLEX", f"PI-RADS {score} - T2WI PZ"),
                    ),
                    AssessmentInput(
                        "DWI score", score, codes.PIRADS_DWI, Code(dwi, "RADLEX", f"PI-RADS {score} - DWI")
                    ),
                    AssessmentInput(
                        "DCE",
                        "not acquired",
                        codes.PIRADS_DCE,
                        Code("RID50327", "RADLEX", "PI-RADS X - DCE Inadequate or absent"),
                    ),
                ),
                explanation=f"Peripheral zone: DWI is dominant; DWI {score} gives category {score}.",
            ),
        ),
        evidence=(Evidence("t2w", T2W_UID, derive_uid("test-study", "t2w", 5), 5),),
        confidence=0.9,
    )


def build_gland(density: float | None = 0.26) -> Finding:
    """The whole gland with volumes, diameters and, unless None, the PSA density."""
    measurements = [
        Measurement("volume_voxels", "Volume by voxel count", codes.VOLUME, 44.3, codes.ML, 1, codes.SEGMENTED_VOXELS),
        Measurement("volume_ellipsoid", "Volume by ellipsoid", codes.VOLUME, 50.0, codes.ML, 1, codes.ELLIPSOID),
        Measurement("diameter_transverse", "Transverse diameter", codes.WIDTH, 52.0, codes.MM, 1),
        Measurement("diameter_ap", "Anteroposterior diameter", codes.HEIGHT, 41.0, codes.MM, 1),
        Measurement("diameter_si", "Craniocaudal length", codes.LENGTH, 45.0, codes.MM, 1),
    ]
    if density is not None:
        measurements.append(Measurement("psa_density", "PSA density", codes.PSA_DENSITY, density, codes.NG_ML_ML, 2))
    return Finding(
        tracking_id="gland",
        tracking_uid=derive_uid("test-job", "finding", "gland"),
        kind=codes.ORGAN,
        site=codes.PROSTATE,
        title="Prostate gland",
        segment_number=1,
        label=1,
        measurements=tuple(measurements),
        centroid_lps_mm=(0.0, 5.0, 0.0),
        evidence=(Evidence("t2w", T2W_UID, derive_uid("test-study", "t2w", 5), 5),),
    )


def build_segments(lesions: tuple[Finding, ...]) -> tuple[Segment, ...]:
    """Segments 1 gland, 2 PZ, 3 TZ, then one a lesion."""
    zone_names = (
        (2, "Peripheral zone", codes.PERIPHERAL_ZONE, 1),
        (3, "Transition zone", codes.TRANSITION_ZONE, 2),
    )
    anatomy = Code("123037004", "SCT", "Anatomical Structure")
    gland = build_gland()
    return (
        Segment(1, "Prostate gland", "gland", 1, anatomy, codes.PROSTATE, "gland", gland.tracking_uid),
        *(
            Segment(n, name, "zones", label, anatomy, code, f"zone-{label}", derive_uid("test-job", "zone", label))
            for n, name, code, label in zone_names
        ),
        *(
            Segment(
                f.segment_number or 0,
                f.title,
                "lesions",
                f.label or 0,
                Code("49755003", "SCT", "Morphologically Abnormal Structure"),
                codes.LESION,
                f.tracking_id,
                f.tracking_uid,
            )
            for f in lesions
        ),
    )


def build_findings(*, lesions: tuple[Finding, ...] | None = None, **changes: object) -> Findings:
    """A whole preliminary result: gland and, by default, two lesions (right PI-RADS 4, left PI-RADS 2)."""
    lesions = (build_lesion(1), build_lesion(2, codes.LEFT, "2")) if lesions is None else lesions
    context = build_context()
    overall = max((f.assessments[0] for f in lesions), key=lambda a: a.score, default=None)
    values: dict[str, object] = {
        "job_id": "test-job",
        "revision": 1,
        "status": "preliminary",
        "created_at": NOW,
        "study_instance_uid": STUDY_UID,
        "accession_number": "ACC-1",
        "study_date": date(2026, 3, 4),
        "study_description": "MR Prostate",
        "patient": PatientIdentity("TEST-001", "", "Phantom^Peter", date(1961, 5, 6), "M"),
        "protocol_name": "prostate_mri",
        "protocol_version": "1",
        "protocol_title": "Prostate MRI, PI-RADS v2.1",
        "model": ModelIdentity("prostate_reference", "1", "Wetread project", "Reference for wiring"),
        "context": context,
        "roles": (
            RoleChoice("t2w", "T2-weighted axial", True, T2W_UID, "4 t2_tse_tra", ("chosen: axial, spin echo",)),
            RoleChoice("dce", "Dynamic contrast", False, None, "", ("no series carries contrast",)),
        ),
        "findings": (build_gland(), *lesions),
        "segments": build_segments(lesions),
        "assessments": ()
        if overall is None
        else (
            Assessment(
                "pirads_overall",
                "PI-RADS v2.1 overall category",
                codes.PIRADS_OVERALL,
                {
                    "2": Code("RID50290", "RADLEX", "PI-RADS 2 - Low"),
                    "4": Code("RID50292", "RADLEX", "PI-RADS 4 - High"),
                    "5": Code("RID50293", "RADLEX", "PI-RADS 5 - Very high"),
                }[overall.score],
                overall.score,
                "pirads_v2_1",
                (AssessmentInput("highest lesion category", overall.score),),
                f"The highest lesion category is {overall.score}.",
            ),
        ),
        "psa": context.labs[0],
        "blanks": (Blank("DCE", "no dynamic contrast series in the study; it counts as negative"),),
        "technique": ("T2-weighted axial: series 4 t2_tse_tra, 19 slices of 3.0 mm",),
        "patient_age": "064Y",
        "reference_frame_uid": FRAME_UID,
    }
    return Findings(**{**values, **changes})  # type: ignore[arg-type]


def build_masks(shape: tuple[int, int, int] = (11, 32, 40)) -> dict[str, npt.NDArray[np.uint8]]:
    """Masks that the default findings' segments point at: gland, zones, two lesions; lesion 1 on slice 5."""
    gland = np.zeros(shape, np.uint8)
    gland[2:9, 6:26, 8:32] = 1
    zones = gland * 2
    zones[:, 18:, :] = (zones[:, 18:, :] > 0) * 1
    lesions = np.zeros(shape, np.uint8)
    lesions[4:7, 20:24, 10:14] = 1
    lesions[5:7, 20:23, 26:30] = 2
    return {"gland": gland, "zones": zones, "lesions": lesions}
