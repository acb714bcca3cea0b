"""What the simulator's EHR knows of the patient of the real study, in the forms that tests give it."""

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from deploy.hospital.chart import chart_bundle
from deploy.hospital.phantom import PhantomSpec

DATA = Path(__file__).parents[2] / "shared" / "data"
REAL_STUDY = DATA / "prostatex-0000" / "images"
REAL_STUDY_UID = "1.3.6.1.4.1.14519.5.2.1.7311.5101.158323547117540061132729905711"
REAL_SPEC = replace(
    PhantomSpec(),
    patient_id="ProstateX-0000",
    patient_name="ProstateX-0000",
    birth_date=date(1948, 2, 1),
    accession="2037145102504919",
    study_date=date(2011, 7, 7),
)
"""The patient, order and date of the real study; its images state no birth date."""


def real_chart(psa_ng_ml: tuple[float, ...] = (9.4, 13.0), **changes: Any) -> dict[str, Any]:
    """The real patient's chart as a transaction; the last PSA (13 ng/mL) is of the week before the study."""
    return chart_bundle(replace(REAL_SPEC, **changes), psa_ng_ml=psa_ng_ml)
