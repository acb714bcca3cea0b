"""Checks the words of an impression, whichever rendering carries them."""

from mappings.model.findings import Findings
from mappings.outputs.read_changes import impression_lines
from mappings.outputs.read_facts import Facts, compare, find_slips, lesion_pieces, prose, read_status, squeeze
from mappings.outputs.read_revision import signature_words, take_lines


def check_impression(artifact: str, words: str, findings: Findings) -> list[str]:
    """What the impression says wrongly of status, categories, each lesion, blanks and model."""
    told, text = take_lines(squeeze(words), findings)
    starts = sorted(_find_starts(text, findings))
    ends = [*(start for start, _ in starts[1:]), len(text)]
    parts = {name: text[start:end] for (start, name), end in zip(starts, ends, strict=True)}
    banner = text[: starts[0][0]] if starts else text
    slips = _check_top(banner, findings)
    for lesion in findings.lesions:
        required, allowed = lesion_pieces(lesion)
        chunk = parts.get(lesion.tracking_id)
        said = ["expected a sentence, found none"] if chunk is None else find_slips(chunk, required, allowed)
        slips += [f"{lesion.tracking_id}: impression: {slip}" for slip in said]
    slips += _check_bottom(text, findings)
    messages = [f"{artifact}: {slip}" for slip in slips]
    messages += _check_changes(artifact, parts.get("changes", ""), findings)
    return messages + [f"{artifact}: {slip}" for slip in told]


def _find_starts(text: str, findings: Findings) -> list[tuple[int, str]]:
    """Where each lesion's sentence begins, and what comes after the lesions."""
    marks = [(squeeze(f"{lesion.title}:"), lesion.tracking_id) for lesion in findings.lesions]
    if findings.comparison is not None:
        marks.append((_since(findings), "changes"))
    marks += [("Nolesionwasproposed", "none"), ("Leftblank:", "blanks"), ("Model:", "model")]
    return [(text.index(mark), name) for mark, name in marks if mark in text]


def _since(findings: Findings) -> str:
    return squeeze(f"Since {findings.comparison.prior_study_date}:") if findings.comparison else ""


def _check_changes(artifact: str, chunk: str, findings: Findings) -> list[str]:
    """Each line about a change since the prior, none too many."""
    expected, found = Facts(), Facts()
    for line in impression_lines(findings):
        expected.add("comparison", "impression", prose(line))
    since = _since(findings)
    for line in chunk.split(since)[1:] if since else []:
        found.add("comparison", "impression", prose(since + line))
    return compare(artifact, expected, found)


def _check_top(banner: str, findings: Findings) -> list[str]:
    status = read_status(banner)
    slips = [] if status == findings.status else [f"impression: status: expected '{findings.status}', found '{status}'"]
    overall = [f"{a.label}: {a.score}." for a in findings.assessments]
    overall += [signature_words(findings)] if findings.signature else []
    return slips + [f"study: impression: {slip}" for slip in find_slips(banner, overall)]


def _check_bottom(text: str, findings: Findings) -> list[str]:
    """The blanks with their reasons, the model, and that "no lesion" is said when there is none."""
    model = findings.model
    wanted = [f"Left blank: {blank.name} ({blank.reason})." for blank in findings.blanks]
    wanted.append(f"Model: {model.name} {model.version}, {model.manufacturer}.")
    slips = [f"impression: expected '{prose(w).shown}', which was not found" for w in wanted if squeeze(w) not in text]
    if text.count("Leftblank:") != len(findings.blanks):
        slips.append(f"impression: blanks: expected {len(findings.blanks)}, found {text.count('Leftblank:')}")
    if ("Nolesionwasproposed" in text) != (not findings.lesions):
        slips.append(f"impression: lesions: expected {len(findings.lesions)}, found another statement")
    return slips
