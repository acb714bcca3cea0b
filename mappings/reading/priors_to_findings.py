"""The findings with what changed since the patient's last study that can be compared."""

from collections.abc import Sequence
from dataclasses import replace

from mappings.model.changes import Comparison, PriorRefused, PriorStudy
from mappings.model.findings import Findings
from mappings.reading.priors_to_changes import compare

COMPARED = "compared"
NO_FINDINGS = "no findings of it are known here"
OLDER = "older than the study that was compared"
Candidate = tuple[PriorStudy, Findings | None]


def with_comparison(current: Findings, priors: Sequence[Candidate]) -> Findings:
    """`current` with `priors` (newest first; equal dates by study UID), each with its outcome, and with the
    comparison with the newest one that can be compared, None where there is none.

    `priors` are all studies that were found, with their findings where known; none at all says that a search
    found nothing. Findings that may not be compared are no error: why not becomes the study's outcome. An outcome
    that is given for a study without findings is kept.
    """
    comparison: Comparison | None = None
    studies = []
    for study, findings in sorted(priors, key=_newest_first):
        outcome = OLDER if findings and comparison else study.outcome or NO_FINDINGS
        if findings and comparison is None:
            comparison, outcome = _try(current, findings)
        studies.append(replace(study, outcome=outcome))
    return replace(current, comparison=comparison, priors=tuple(studies), priors_searched=True)


def _newest_first(candidate: Candidate) -> tuple[int, str]:
    """Undated studies come last: nobody can say how long ago they were."""
    study = candidate[0]
    return (-study.study_date.toordinal() if study.study_date else 0, study.study_instance_uid)


def _try(current: Findings, prior: Findings) -> tuple[Comparison | None, str]:
    try:
        return compare(current, prior), COMPARED
    except PriorRefused as refused:
        return None, str(refused)
