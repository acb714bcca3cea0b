"""Reads the HTML draft back with html.parser: marked values, rows, header, impression, blanks, ids."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

from mappings.model.findings import Assessment, Finding, Findings
from mappings.outputs.read_comparison_html import COLUMNS, HEAD, LISTED, SAID, WHERE, expect_comparison
from mappings.outputs.read_facts import (
    Facts,
    compare,
    find_slips,
    find_unsaid,
    lesion_pieces,
    place_words,
    prose,
    read_status,
    squeeze,
)
from mappings.outputs.read_report_text import PLAIN_LABELS, expect_blanks, expect_header_rows, plain_value
from mappings.outputs.read_revision import check_lines, check_own_words, signature_words

HTML = "report.html"
DOCUMENT, STUDY = "document", "study"
DENSITY = "psa_density"
"""Stands in a table in one template, in a sentence in another: only its value is read."""
VOID = {"meta", "br", "hr", "img", "link", "input", "wbr"}


@dataclass
class Element:
    """One element: its tag, attributes and what it holds."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All words inside."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def find(self, tag: str = "", **attributes: str) -> Iterator["Element"]:
        """Elements below of this tag whose attributes (`data_finding` for data-finding) have these values; an
        empty value asks only that the attribute is there."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        for child in self.children:
            if isinstance(child, Element):
                if child._fits(tag, wanted):
                    yield child
                yield from child.find(tag, **attributes)

    def _fits(self, tag: str, wanted: dict[str, str]) -> bool:
        own = self.attributes
        named = all(n in own and (not v or v in own[n].split() or v == own[n]) for n, v in wanted.items())
        return named and tag in ("", self.tag)


class _Tree(HTMLParser):
    """Builds the tree of a page whose elements are all closed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("")]
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if self.open[-1].tag != tag:
            raise ValueError(f"</{tag}> closes <{self.open[-1].tag}>")
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def check_report_html(data: bytes, findings: Findings) -> list[str]:
    """Everything in which the page disagrees with the findings."""
    page, found = _Tree(data.decode("utf-8")).open[0], Facts()
    _read_top(found, page)
    _read_values(found, page)
    _read_articles(found, page)
    _read_sources(found, page)
    _read_comparison(found, page)
    slips = _check_impression(page, findings)
    slips += find_unsaid(page.text, findings)
    told = [li.text for section in page.find("section", aria_labelledby="revision") for li in section.find("li")]
    own_words = [p.text for section in page.find("section", aria_labelledby="own-words") for p in section.find("p")]
    banner = "".join(p.text for p in page.find("p", class_="banner"))
    model = f"{findings.model.name} version {findings.model.version}"
    if squeeze(model) not in squeeze(banner):
        slips.append(f"{DOCUMENT}: model: expected '{model}', which was not found")
    if squeeze(signature_words(findings)) not in squeeze(banner):
        slips.append(f"{DOCUMENT}: banner above: expected who signed, which was not found")
    messages = compare(HTML, _expect_all(findings), found) + [f"{HTML}: {slip}" for slip in slips]
    return messages + check_lines(HTML, told, findings) + check_own_words(HTML, " ".join(own_words), findings)


def _read_top(facts: Facts, page: Element) -> None:
    for banner in page.find("p", class_="banner"):
        words = "".join(strong.text for strong in banner.find("strong"))
        facts.add(DOCUMENT, "status of the banner above", read_status(words))
    for footer in page.find("footer"):
        facts.add(DOCUMENT, "status of the banner below", read_status(footer.text))
    for row in page.find("dl", class_="facts"):
        for pair in row.find("div"):
            label = "".join(dt.text for dt in pair.find("dt"))
            words = "".join(c for dd in pair.find("dd") for c in dd.children if isinstance(c, str))
            if label in PLAIN_LABELS:
                facts.add(DOCUMENT, label, plain_value(label, words))


def _read_values(facts: Facts, page: Element) -> None:
    """Every marked value, wherever it is repeated; the rows that explain them."""
    for span in page.find("", data_finding="", data_measurement=""):
        where, key = span.attributes["data-finding"], span.attributes["data-measurement"]
        facts.add_once(where, key, " ".join(span.text.split()))
    for span in page.find("span", data_finding="", data_assessment=""):
        where, key = span.attributes["data-finding"], span.attributes["data-assessment"]
        facts.add_once(where, f"{key}: score", span.text.strip())
    for line in page.find("p", class_="category"):
        for span in line.find("span", data_assessment=""):
            where, key = span.attributes["data-finding"], span.attributes["data-assessment"]
            facts.add_once(where, key, prose(line.text))
    for why in page.find("p", class_="why"):
        where, key = why.attributes.get("data-finding", ""), why.attributes.get("data-assessment", "")
        facts.add_once(where, f"{key}: why", prose(why.text))
    for row in page.find("tr"):
        _read_row(facts, row)


def _read_row(facts: Facts, row: Element) -> None:
    spans = list(row.find("span", data_measurement=""))
    if len(spans) == 1:
        where, key = spans[0].attributes["data-finding"], spans[0].attributes["data-measurement"]
        if key == DENSITY:
            return
        cells = [cell for cell in row.children if isinstance(cell, Element)]
        facts.add_once(where, f"{key}: label", prose(cells[0].text))
        facts.add_once(where, f"{key}: method", prose(cells[-1].text))


def _read_articles(facts: Facts, page: Element) -> None:
    """One article a lesion: its title, place and sector; evidence is marked wherever it stands."""
    for article in page.find("article", data_finding=""):
        where = article.attributes["data-finding"]
        if not where.startswith("lesion"):
            continue
        title = "".join(c for h3 in article.find("h3") for c in h3.children if isinstance(c, str))
        facts.add(where, "heading", prose(title))
        for item in article.find("li"):
            label, _, words = item.text.partition(": ")
            if label in ("Location", "Sector"):
                facts.add(where, label.casefold(), prose(words.casefold()))
    for item in page.find("li", data_evidence=""):
        shown = f"{item.attributes['data-evidence']} {' '.join(item.text.split())}"
        facts.add(item.attributes.get("data-finding", ""), "evidence", prose(shown))
    for section in page.find("section", aria_labelledby="blanks"):
        for item in section.find("li"):
            facts.add(DOCUMENT, "left blank", prose(item.text))


def _read_comparison(facts: Facts, page: Element) -> None:
    """The section on the prior, and the impression's lines about changes."""
    sections = list(page.find("section", aria_labelledby="comparison"))
    facts.add(WHERE, "section", "yes" if sections else "no")
    for item in page.find("li", data_change="impression"):
        facts.add(WHERE, "impression", prose(item.text))
    for section in sections:
        for article in section.find("article"):
            _read_change(facts, article)
        for paragraph in (c for c in section.children if isinstance(c, Element) and c.tag == "p"):
            facts.add(WHERE, SAID, prose(paragraph.text))
        for item in section.find("li"):
            facts.add(WHERE, LISTED, prose(item.text))


def _read_change(facts: Facts, article: Element) -> None:
    where = article.attributes.get("data-change", "")
    for h3 in article.find("h3"):
        words = [c if isinstance(c, str) else c.text for c in h3.children if isinstance(c, str) or c.tag == "a"]
        facts.add(where, HEAD, prose("".join(words)))
    for paragraph in article.find("p"):
        facts.add(where, SAID, prose(paragraph.text))
    for head in article.find("thead"):
        facts.add(where, "head of the table of changes", prose(head.text))
    for row in (row for body in article.find("tbody") for row in body.find("tr")):
        keys = [span.attributes["data-measurement"] for span in row.find("span", data_measurement="")]
        key = keys[1] if len(keys) > 1 else "row"
        facts.add(where, f"{key}: {COLUMNS}", " ".join(keys))
        facts.add(where, f"{key}: label of the change", prose("".join(th.text for th in row.find("th"))))


def _read_sources(facts: Facts, page: Element) -> None:
    for section in page.find("section", aria_labelledby="sources"):
        for row in section.find("tr"):
            cells = [cell for cell in row.children if isinstance(cell, Element)]
            codes = [code.text for code in row.find("code")]
            if len(codes) == 2:
                facts.add(codes[0], "segment", cells[2].text.strip())
                facts.add(codes[0], "tracking UID", codes[1])
        paragraphs = [p for p in section.find("p") if any(True for _ in p.find("code"))]
        for paragraph in paragraphs:
            facts.add(DOCUMENT, "Study Instance UID", "".join(code.text for code in paragraph.find("code")))


def _check_impression(page: Element, findings: Findings) -> list[str]:
    items = [item for s in page.find("section", class_="impression") for item in s.find("li", data_finding="")]
    slips = []
    if len(items) != len(findings.lesions):
        slips.append(f"{STUDY}: impression: expected {len(findings.lesions)} lesion(s), found {len(items)}")
    for lesion in findings.lesions:
        required, allowed = lesion_pieces(lesion)
        own = [item.text for item in items if item.attributes["data-finding"] == lesion.tracking_id]
        said = find_slips(own[0], required, allowed) if own else ["expected a sentence, found none"]
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
    return facts


def _expect_finding(facts: Facts, finding: Finding) -> None:
    where = finding.tracking_id
    for m in finding.measurements:
        facts.add(where, m.key, f"{m.text} {m.unit.value}")
        made = m.method or m.derivation
        if m.key != DENSITY:
            facts.add(where, f"{m.key}: label", prose(m.label))
            facts.add(where, f"{m.key}: method", prose(made.meaning if made else ""))
    if finding.confidence is not None:
        facts.add(where, "confidence", f"{finding.confidence:.2f}")
    for assessment in finding.assessments:
        _expect_assessment(facts, where, assessment)
    if finding.label is not None and where.startswith("lesion"):
        _expect_article(facts, finding)
    for seen in finding.evidence:
        shown = f"{seen.sop_instance_uid} Shown on {seen.role} slice {seen.frame_index + 1} of the stack"
        facts.add(where, "evidence", prose(shown))
    segment = finding.segment_number
    facts.add(where, "segment", "none" if segment is None else str(segment))
    facts.add(where, "tracking UID", finding.tracking_uid)


def _expect_article(facts: Facts, lesion: Finding) -> None:
    facts.add(lesion.tracking_id, "heading", prose(lesion.title))
    if place_words(lesion):
        facts.add(lesion.tracking_id, "location", prose(place_words(lesion)))
    if lesion.sector is not None:
        facts.add(lesion.tracking_id, "sector", prose(lesion.sector.meaning.casefold()))


def _expect_assessment(facts: Facts, where: str, assessment: Assessment) -> None:
    facts.add(where, f"{assessment.key}: score", assessment.score)
    facts.add(where, assessment.key, prose(f"{assessment.label}: {assessment.score} {assessment.value.meaning}"))
    inputs = ", ".join(f"{given.name} {given.value}" for given in assessment.inputs) + "." if assessment.inputs else ""
    why = f"{assessment.explanation} Rule {assessment.rule}; inputs: {inputs}"
    facts.add(where, f"{assessment.key}: why", prose(why))
