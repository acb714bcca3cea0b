"""Results with a comparison: the default result against an earlier one, with each thing that may become of a lesion."""

from collections.abc import Callable
from dataclasses import replace
from datetime import date

from mappings.model import codes
from mappings.model.changes import PriorStudy
from mappings.model.findings import Finding, Findings
from mappings.model.ids import derive_uid
from mappings.reading.priors_to_findings import with_comparison
from tests.builders import build_findings, build_gland, build_lesion
from tests.renderings import place_findings

PRIOR_UID = derive_uid("test-prior")
PRIOR_DATE = date(2025, 3, 4)
OTHER = PriorStudy(derive_uid("test-older"), date(2023, 5, 6), "MR pelvis", "ACC-0", "pacs")


def resize(lesion: Finding, **values: float) -> Finding:
    """The lesion with other values of these measurements."""
    changed = tuple(replace(m, value=values.get(m.key, m.value)) for m in lesion.measurements)
    return replace(lesion, measurements=changed)


def build_prior(current: Findings, *lesions: Finding, **changes: object) -> Findings:
    """The findings of an earlier study of the same patient: the same gland, a little smaller, and these lesions."""
    gland = current.gland or build_gland()
    gland = resize(gland, volume_voxels=40.0, volume_ellipsoid=46.1)
    tracked = tuple(replace(f, tracking_uid=derive_uid("test-prior-job", f.tracking_id)) for f in (gland, *lesions))
    values: dict[str, object] = {
        "job_id": "test-prior-job",
        "study_instance_uid": PRIOR_UID,
        "study_date": PRIOR_DATE,
        "findings": tracked,
        **changes,
    }
    return replace(current, **values)  # type: ignore[arg-type]


def prior_study(findings: Findings, outcome: str = "") -> PriorStudy:
    """How a search would name this study."""
    return PriorStudy(
        findings.study_instance_uid, findings.study_date, findings.study_description, "ACC-2", "own readings", outcome
    )


def compare_with(current: Findings, prior: Findings, *others: PriorStudy) -> Findings:
    """`current` compared with `prior`; the others have no findings."""
    return with_comparison(current, [(prior_study(prior), prior), *((other, None) for other in others)])


def build_compared() -> Findings:
    """Lesion 1 grew from half its volume, lesion 2 is new, a lesion of the prior is gone, a study has no findings."""
    current = place_findings(build_findings())
    first = resize(current.lesions[0], volume=0.16, diameter_in_plane=7.5, diameter_3d=9.8)
    return compare_with(current, build_prior(current, first, _elsewhere(current)), OTHER)


def _elsewhere(current: Findings) -> Finding:
    """A lesion at a place where the current study has none."""
    centre = current.gland.centroid_lps_mm if current.gland else None
    assert centre is not None
    x, y, z = centre
    return replace(
        build_lesion(2, codes.LEFT, "2"), zone=codes.TRANSITION_ZONE, centroid_lps_mm=(x + 12, y - 16, z + 9)
    )


def build_ambiguous() -> Findings:
    """Lesion 1 lies between two of the prior; lesion 2 shrank; another model read the prior, another protocol."""
    current = place_findings(build_findings())
    one, two = current.lesions
    assert one.centroid_lps_mm is not None
    x, y, z = one.centroid_lps_mm
    near = [replace(one, centroid_lps_mm=(x, y + d, z)) for d in (-3.0, 3.5)]
    second = replace(near[1], tracking_id="lesion-2", title="Lesion 2")
    third = replace(resize(two, volume=0.5), tracking_id="lesion-3", title="Lesion 3")
    model = replace(current.model, version="0")
    return compare_with(current, build_prior(current, near[0], second, third, model=model, protocol_name="other"))


def build_short() -> Findings:
    """Three weeks apart: no rates; the zone of lesion 1 was another."""
    current = place_findings(build_findings())
    one, two = current.lesions
    prior = build_prior(current, replace(one, zone=codes.TRANSITION_ZONE), two, study_date=date(2026, 2, 11))
    return compare_with(current, prior)


def build_refused() -> Findings:
    """Priors were found, none can be compared."""
    current = place_findings(build_findings())
    prior = build_prior(current, *current.lesions, study_date=None)
    return compare_with(current, prior, OTHER)


def build_not_found() -> Findings:
    """Somebody looked, and there is no prior."""
    return with_comparison(place_findings(build_findings()), ())


COMPARED: dict[str, Callable[[], Findings]] = {
    "compared": build_compared,
    "ambiguous": build_ambiguous,
    "three weeks apart": build_short,
    "no prior comparable": build_refused,
    "no prior found": build_not_found,
}
