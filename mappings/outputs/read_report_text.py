"""Reads the text draft back: banner, labelled rows, rows marked `[finding/measurement]`, impression, blanks."""

import re
from collections.abc import Mapping, Sequence

from mappings.model.findings import Assessment, Finding, Findings
from mappings.outputs.read_comparison_text import (
    expect_comparison,
    expect_impression_items,
    read_comparison,
    read_impression_items,
)
from mappings.outputs.read_facts import (
    Facts,
    Value,
    compare,
    find_slips,
    find_unsaid,
    lesion_pieces,
    number,
    place_words,
    prose,
    read_status,
    squeeze,
    withheld,
)
from mappings.outputs.read_revision import check_lines, check_own_words, signature_words

TEXT = "report.txt"
DOCUMENT, STUDY = "document", "study"
NOT_STATED = "not stated"
CONTINUED = 20
"""A line indented by more continues the row above it: labels end and values begin at the right of this."""
_RULE = re.compile(r"^-{20,}$")
_BAR = re.compile(r"^={20,}$", re.MULTILINE)
_MARK = re.compile(r"\s*\[([^\[\]]+)\]$")
_ITEM = re.compile(r"^  (?:\d+\.|-|\[[^\[\]/]+\]|Study) ")
_LEAD = re.compile(r"\[([^\[\]]+)\].*?(?:,segment(\d+))?,trackingUID([0-9.]+)")
PLAIN_LABELS = ("Patient", "Patient ID", "Birth date, sex", "Accession number", "Study", "Result", "PSA")


def check_report_text(data: bytes, findings: Findings) -> list[str]:
    """Everything in which the text draft disagrees with the findings."""
    text = data.decode("utf-8")
    sections = _split_sections(text)
    found, rows = Facts(), _read_rows(sections.get("", []))
    clinical, technique = (sections.pop(name, []) for name in ("CLINICAL DATA", "TECHNIQUE"))
    _read_top(found, text, rows + _read_rows(clinical))
    read_comparison(found, sections.pop("COMPARISON", None))
    told, own_words = sections.pop("REVISION", []), sections.pop("REPORT AS SIGNED", [])
    for name, lines in sections.items():
        if name not in ("", "IMPRESSION", "LEFT BLANK", "WHERE THE MARKS LEAD"):
            _read_marked(found, _read_rows(lines), findings)
    impression = sections.get("IMPRESSION", [])
    before = next((i for i, line in enumerate(impression) if _ITEM.match(line)), len(impression))
    _read_marked(found, _read_rows(impression[:before]), findings)
    read_impression_items(found, _read_items(impression, "  - "))
    _read_blanks(found, sections.get("LEFT BLANK", []))
    _read_ids(found, sections.get("WHERE THE MARKS LEAD", []))
    slips = _check_impression(impression, findings)
    slips += find_unsaid(text, findings)
    if squeeze(signature_words(findings)) not in squeeze(_banners(text)[0]):
        slips.append(f"{DOCUMENT}: banner above: expected who signed, which was not found")
    if squeeze(f"{findings.model.name} version {findings.model.version}") not in squeeze(_banners(text)[0]):
        slips.append(f"{DOCUMENT}: model: expected '{findings.model.name} version {findings.model.version}'")
    if not technique:
        slips.append(f"{DOCUMENT}: technique: expected a section, found none")
    messages = compare(TEXT, _expect_all(findings), found) + [f"{TEXT}: {slip}" for slip in slips]
    messages += check_lines(TEXT, [item.strip().removeprefix("- ") for item in _read_items(told)], findings)
    return messages + check_own_words(TEXT, " ".join(own_words), findings)


def _split_sections(text: str) -> dict[str, list[str]]:
    """The lines below each heading (a line over a rule of dashes), by its words without mark; the top under ""."""
    sections: dict[str, list[str]] = {"": []}
    current, lines = "", text.split("\n")
    for index, line in enumerate(lines):
        if index + 1 < len(lines) and _RULE.match(lines[index + 1]):
            current = re.split(r"\s{2,}", line.strip())[0]
            sections[current] = []
        elif not _RULE.match(line):
            sections[current].append(line)
    return sections


def _read_rows(lines: Sequence[str]) -> list[str]:
    """Rows with their continuations, each as one line; the indentation of the first line is kept."""
    rows: list[str] = []
    for line in lines:
        if rows and line.strip() and len(line) - len(line.lstrip()) >= CONTINUED:
            rows[-1] += " " + line.strip()
        elif line.strip():
            rows.append(line.rstrip())
    return rows


def _banners(text: str) -> tuple[str, str]:
    """The words between the first two double rules, and those after the last one."""
    parts = _BAR.split(text)
    return (parts[1], parts[-1]) if len(parts) > 2 else ("", "")


def _read_top(facts: Facts, text: str, rows: Sequence[str]) -> None:
    top, bottom = _banners(text)
    facts.add(DOCUMENT, "status of the banner above", read_status(top.split("Model:")[0]))
    facts.add(DOCUMENT, "status of the banner below", read_status(bottom))
    for row in rows:
        label, _, value = row.strip().removesuffix(":").partition(": ")
        mark = _MARK.search(value)
        words = value[: mark.start()] if mark and label == "PSA" else value
        if label in PLAIN_LABELS:
            facts.add(DOCUMENT, label, plain_value(label, words))


def plain_value(label: str, words: str) -> Value:
    """A labelled value of either draft; what names the patient or the order is withheld."""
    words = words.replace(",", " ") if label == "Patient" else words.replace("sex not stated", NOT_STATED)
    if label in ("Result", "Study", "PSA"):
        return Value(squeeze(words), " ".join(words.split()))
    return withheld(squeeze(words))


def _read_marked(facts: Facts, rows: Sequence[str], findings: Findings) -> None:
    """Rows that end in a mark. A measurement's row gives its value, any other row its words."""
    known = {(f.tracking_id, m.key): m.label for f in findings.findings for m in f.measurements}
    unnamed = {f.tracking_id for f in findings.findings if f not in findings.lesions}
    for row in rows:
        mark = _MARK.search(row)
        if mark is None:
            continue
        where, _, key = mark[1].partition("/")
        label, _, value = row[: mark.start()].strip().rpartition(": ")
        if (where, key) in known:
            facts.add(where, key, " ".join(value.split()))
            kept = squeeze(known[where, key]).startswith(squeeze(label))
            facts.add(where, f"{key}: label", prose(known[where, key] if kept else label))
        elif key:
            facts.add(where, key, prose(row[: mark.start()]))
        elif row.startswith(" "):
            facts.add(where, "row", prose(row[: mark.start()].casefold()))
        elif where not in unnamed:
            facts.add_once(where, "heading", prose(row[: mark.start()]))


def _read_blanks(facts: Facts, lines: Sequence[str]) -> None:
    for item in _read_items(lines):
        facts.add(DOCUMENT, "left blank", prose(item.strip().removeprefix("- ")))


def _read_items(lines: Sequence[str], lead: str = "") -> list[str]:
    """List items (led by `-`, `1.`, `[id]` or `Study`; only those led by `lead`), each as one line."""
    items: list[str] = []
    for line in lines:
        if _ITEM.match(line):
            items.append(line)
        elif items and line.startswith("    "):
            items[-1] += " " + line.strip()
    return [item for item in items if item.startswith(lead)]


def _read_ids(facts: Facts, lines: Sequence[str]) -> None:
    for item in map(squeeze, _read_items(lines)):
        if lead := _LEAD.fullmatch(item):
            facts.add(lead[1], "segment", lead[2] or "")
            facts.add(lead[1], "tracking UID", lead[3])
        elif item.startswith("Study"):
            facts.add(DOCUMENT, "Study Instance UID", item.removeprefix("Study"))


def _check_impression(lines: Sequence[str], findings: Findings) -> list[str]:
    """One numbered sentence for each lesion, saying its category, side and size and nothing else."""
    items = [_ITEM.sub("", item) for item in _read_items(lines) if not item.startswith("  - ")]
    slips, sentences = [], {mark[1]: item[: mark.start()] for item in items if (mark := _MARK.search(item))}
    if len(items) != len(findings.lesions):
        slips.append(f"{STUDY}: impression: expected {len(findings.lesions)} lesion(s), found {len(items)}")
    for lesion in findings.lesions:
        required, allowed = lesion_pieces(lesion)
        sentence = sentences.get(lesion.tracking_id)
        said = ["expected a sentence, found none"] if sentence is None else find_slips(sentence, required, allowed)
        slips += [f"{lesion.tracking_id}: impression: {slip}" for slip in said]
    return slips


def _expect_all(findings: Findings) -> Facts:
    facts = Facts()
    facts.add(DOCUMENT, "status of the banner above", findings.status)
    facts.add(DOCUMENT, "status of the banner below", findings.status)
    for label, value in expect_header_rows(findings).items():
        facts.add(DOCUMENT, label, plain_value(label, value))
    for finding in findings.findings:
        _expect_finding(facts, finding)
    for assessment in findings.assessments:
        _expect_assessment(facts, STUDY, assessment)
    for blank in expect_blanks(findings):
        facts.add(DOCUMENT, "left blank", prose(blank))
    facts.add(DOCUMENT, "Study Instance UID", findings.study_instance_uid)
    expect_comparison(facts, findings)
    expect_impression_items(facts, findings)
    return facts


def expect_header_rows(findings: Findings) -> Mapping[str, str]:
    """The labelled values at the top of both drafts. A name's commas are of no account."""
    patient, psa = findings.patient, findings.psa
    groups = [group for group in patient.name.split("=") if group.strip("^ ")]
    issuer = f" ({patient.issuer})" if patient.issuer else ""
    rows = {
        "Patient": groups[0].replace("^", " ").replace(",", " ") if groups else NOT_STATED,
        "Patient ID": f"{patient.patient_id}{issuer}",
        "Birth date, sex": f"{patient.birth_date or NOT_STATED}, {patient.sex or NOT_STATED}",
        "Study": f"{findings.study_description or 'no description'}, {findings.study_date or NOT_STATED}",
        "Accession number": findings.accession_number or NOT_STATED,
        "Result": f"revision {findings.revision}, {findings.status}, "
        + findings.created_at.isoformat(sep=" ", timespec="minutes"),
    }
    if psa is not None:
        rows["PSA"] = f"{number(psa.value).key} {psa.unit} on {psa.effective_at.date()}"
    return rows


def expect_blanks(findings: Findings) -> list[str]:
    """What was left blank; what the context lacks is said once."""
    reasons = [blank.reason for blank in findings.blanks]
    missing = [words for words in findings.context.missing if words not in reasons]
    return [*(f"{blank.name}: {blank.reason}" for blank in findings.blanks), *missing]


def _expect_finding(facts: Facts, finding: Finding) -> None:
    where = finding.tracking_id
    for m in finding.measurements:
        facts.add(where, m.key, f"{m.text} {m.unit.value}")
        facts.add(where, f"{m.key}: label", prose(m.label))
    if finding.confidence is not None:
        facts.add(where, "confidence", prose(f"Model's confidence: {finding.confidence:.2f}"))
    for assessment in finding.assessments:
        _expect_assessment(facts, where, assessment)
    if place_words(finding):
        facts.add(where, "row", prose(f"location: {place_words(finding)}"))
    if finding.sector is not None:
        facts.add(where, "row", prose(f"sector: {finding.sector.meaning}".casefold()))
    for seen in finding.evidence:
        facts.add(where, "row", prose(f"shown on: {seen.role} slice {seen.frame_index + 1} of the stack".casefold()))
    if finding.label is not None and finding.tracking_id.startswith("lesion"):
        facts.add(where, "heading", prose(finding.title))
    facts.add(where, "segment", str(finding.segment_number or ""))
    facts.add(where, "tracking UID", finding.tracking_uid)


def _expect_assessment(facts: Facts, where: str, assessment: Assessment) -> None:
    facts.add(where, assessment.key, prose(f"{assessment.label}: {assessment.score}, {assessment.value.meaning}"))
    for given in assessment.inputs:
        facts.add(where, assessment.key, prose(f"{given.name}: {given.value}"))
