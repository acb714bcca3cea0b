"""Coded concepts that more than one rendering needs, each with its coding scheme.

Scheme designators are DICOM's (PS3.16 section 8): DCM, SCT (SNOMED CT), LN (LOINC), UCUM, RADLEX, IBSI.
Code values were taken from pydicom's copy of PS3.16 (`pydicom.sr.codedict`).
"""

from dataclasses import dataclass

SYSTEM_URLS = {
    "DCM": "http://dicom.nema.org/resources/ontology/DCM",
    "SCT": "http://snomed.info/sct",
    "LN": "http://loinc.org",
    "UCUM": "http://unitsofmeasure.org",
    "RADLEX": "http://radlex.org",
    "IBSI": "https://ibsi.readthedocs.io",
    "99WETREAD": "urn:wetread:codes",
}
"""FHIR `system` of each DICOM coding scheme designator."""


@dataclass(frozen=True)
class Code:
    """One coded concept: value, scheme designator, meaning."""

    value: str
    scheme: str
    meaning: str

    @property
    def system(self) -> str:
        """The FHIR system URL of the scheme."""
        return SYSTEM_URLS[self.scheme]


# Units (UCUM)
ML = Code("mL", "UCUM", "milliliter")
MM = Code("mm", "UCUM", "millimeter")
ADC_UNIT = Code("um2/s", "UCUM", "square micrometer per second")
NG_ML = Code("ng/mL", "UCUM", "nanogram per milliliter")
NG_ML_ML = Code("ng/mL/mL", "UCUM", "nanogram per milliliter per milliliter")
PROBABILITY = Code("1", "UCUM", "no units")

# Anatomy
PROSTATE = Code("41216001", "SCT", "Prostate")
PERIPHERAL_ZONE = Code("279706003", "SCT", "Peripheral zone of the prostate")
TRANSITION_ZONE = Code("399384005", "SCT", "Transition zone of the prostate")
RIGHT = Code("24028007", "SCT", "Right")
LEFT = Code("7771000", "SCT", "Left")
BILATERAL = Code("51440002", "SCT", "Right and left")

# Kinds of finding
ORGAN = Code("113343008", "SCT", "Organ")
LESION = Code("52988006", "SCT", "Lesion")

# Quantities
VOLUME = Code("118565006", "SCT", "Volume")
LENGTH = Code("410668003", "SCT", "Length")
WIDTH = Code("103355008", "SCT", "Width")
HEIGHT = Code("121207", "DCM", "Height")
LONGEST_DIAMETER_IN_PLANE = Code("103339001", "SCT", "Long axis")
LONGEST_DIAMETER_3D = Code("L0JK", "IBSI", "Maximum 3D Diameter of a Mesh")
ADC = Code("113041", "DCM", "Apparent Diffusion Coefficient")
PSA = Code("2857-1", "LN", "Prostate specific Ag [Mass/volume] in Serum or Plasma")
PSA_DENSITY = Code("15325-4", "LN", "Prostate specific Antigen Density")
CONFIDENCE = Code("111012", "DCM", "Certainty of Finding")

# Words of a report (PS3.16 Annex D)
COMMENT = Code("121106", "DCM", "Comment")
PREVIOUS_FINDING = Code("121069", "DCM", "Previous Finding")
COMPARISON = Code("111424", "DCM", "Comparison to previous studies")

# How a quantity was made
MEAN = Code("373098007", "SCT", "Mean")
TENTH_PERCENTILE = Code("371890005", "SCT", "10th Percentile Value of population")
SEGMENTED_VOXELS = Code("126030", "DCM", "Sum of segmented voxel method for volume")
ELLIPSOID = Code("126029", "DCM", "LWH method for volume of ellipsoid")

# PI-RADS (PS3.16 CIDs 6324, 6328-6332, TID 4300 family)
PIRADS_V2_1 = Code("130565", "DCM", "PI-RADS v2.1")
PIRADS_LESION = Code("130560", "DCM", "PI-RADS Localized Abnormality Assessment")
PIRADS_T2WI = Code("130561", "DCM", "PI-RADS T2WI Lesion Assessment")
PIRADS_DWI = Code("130562", "DCM", "PI-RADS DWI Lesion Assessment")
PIRADS_DCE = Code("130563", "DCM", "PI-RADS DCE Lesion Assessment")
PIRADS_OVERALL = Code("130554", "DCM", "Overall Prostate Finding")

# Titles of a rejection note (PS3.16 CID 7011; IHE Radiology, Imaging Object Change Management)
REJECTED_FOR_QUALITY = Code("113001", "DCM", "Rejected for Quality Reasons")
REJECTED_FOR_PATIENT_SAFETY = Code("113037", "DCM", "Rejected for Patient Safety Reasons")
