"""What the impression says, in words shared by every rendering that carries it."""

from mappings.model.findings import Assessment, Finding, Findings
from mappings.model.measurement import Measurement
from mappings.outputs.comparison_values import comparison_impression
from mappings.outputs.revision_words import revision_sentences, signature_sentence

LESION_SIZE_KEYS = ("diameter_3d", "diameter_in_plane")
"""The measurements that tell two lesions of one category apart, the first that is there."""


def lesion_category(lesion: Finding) -> Assessment | None:
    """The category of a lesion: its first assessment, None where no rule gave one."""
    return lesion.assessments[0] if lesion.assessments else None


def lesion_size(lesion: Finding) -> Measurement | None:
    """The longest diameter that the lesion has, in 3D where measured."""
    sizes = (lesion.measurement(key) for key in LESION_SIZE_KEYS)
    return next((size for size in sizes if size is not None), None)


def _rank(lesion: Finding) -> tuple[float, float, str]:
    category, size = lesion_category(lesion), lesion_size(lesion)
    score = float(category.score) if category and category.score.isdecimal() else 0.0
    return (-score, -size.value if size else 0.0, lesion.tracking_id)


def lesions_by_category(findings: Findings) -> tuple[Finding, ...]:
    """The lesions, highest category first, the larger of two equals first; those without a number last."""
    return tuple(sorted(findings.lesions, key=_rank))


def _lower_first(words: str) -> str:
    return words[:1].lower() + words[1:]


def describe_place(finding: Finding) -> str:
    """Side, zone and level in words ("right, peripheral zone of the prostate, mid"); empty if none is known."""
    codes = (finding.laterality, finding.zone)
    words = [_lower_first(code.meaning) for code in codes if code is not None]
    return ", ".join([*words, *([finding.level] if finding.level else [])])


def describe_lesion(lesion: Finding) -> str:
    """One lesion in one line: title, category, place, size; what is not known is left out."""
    category, size = lesion_category(lesion), lesion_size(lesion)
    parts = [
        f"{category.label} {category.score}" if category else "no category",
        describe_place(lesion),
        f"{_lower_first(size.label)} {size.text} {size.unit.value}" if size else "",
    ]
    return f"{lesion.title}: {'; '.join(part for part in parts if part)}."


def status_banner(findings: Findings) -> str:
    """What a reader must know before reading: who stands behind the text, by status."""
    touched = "changed by a person, not signed" if findings.edits else "no person has checked this text"
    banner = {
        "preliminary": f"AI-PROPOSED, UNVERIFIED, PRELIMINARY: {touched}.",
        "final": "AI-proposed text, released as final by a person.",
        "amended": "AI-proposed text, amended by a person.",
        "corrected": "AI-proposed text, corrected by a person.",
        "entered-in-error": "WITHDRAWN (entered in error): do not use.",
    }[findings.status]
    return f"{banner} {signature_sentence(findings)}".strip()


def no_lesion(findings: Findings) -> str:
    """What is said where no lesion is reported: that none was proposed, or none that a person kept."""
    rejected = any(row.why == "rejected" and row.finding.label is not None for row in findings.dropped)
    return f"No lesion was proposed by the model{' that a person kept' if rejected else ''}."


def findings_to_impression(findings: Findings) -> tuple[str, ...]:
    """The impression line by line: banner, overall categories, lesions by category, what changed since the
    prior, blanks with reasons, what people did to it."""
    overall = [f"{a.label}: {a.score}." for a in findings.assessments]
    lesions = [describe_lesion(lesion) for lesion in lesions_by_category(findings)]
    blanks = [f"Left blank: {blank.name} ({blank.reason})." for blank in findings.blanks]
    return (
        status_banner(findings),
        *overall,
        *(lesions or [no_lesion(findings)]),
        *comparison_impression(findings, lesions_by_category(findings)),
        *blanks,
        *revision_sentences(findings),
        f"Model: {findings.model.name} {findings.model.version}, {findings.model.manufacturer}.",
    )
