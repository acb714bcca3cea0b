"""The report drafts: what they say, that each number leads to its finding, and hostile input."""

import dataclasses
import itertools
import re
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import pytest
from jinja2.exceptions import SecurityError

from mappings.model import codes
from mappings.model.context import ClinicalContext, ContextOrder
from mappings.model.findings import Blank, Finding, Findings
from mappings.model.study import PatientIdentity
from mappings.outputs.findings_to_draft import (
    TEXT_WIDTH,
    Draft,
    draft_environment,
    findings_to_draft,
    format_age,
    format_person,
    make_printable,
)
from tests.builders import build_context, build_findings, build_gland, build_lesion

TEMPLATES = Path(__file__).parents[2] / "templates" / "report"
HOSTILE = "<script>alert(1)</script>{{7*7}}{% raw %}\x07\r\nIMPRESSION\u202e|^~\\& \ud800 \"'>"
VOID_TAGS = {"meta", "br", "hr", "img", "link", "input", "wbr"}


class Page(HTMLParser):
    """Reads a page and notes what a validator would: unbalanced tags, repeated ids, and marked values."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.marked: dict[tuple[str, str], set[str]] = {}
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert len(values) == len(attrs), f"repeated attribute in {tag}"
        self.tags.append(tag)
        self.ids += [value for value in [values.get("id")] if value]
        self.links += [value for key in ("href", "src") if (value := values.get(key))]
        if tag not in VOID_TAGS:
            self.stack.append((tag, values))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"{tag} closed but not open"
        opened, _ = self.stack.pop()
        assert opened == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1][0] == "style":
            return
        self.texts.append(data)
        for _, values in self.stack[-1:]:
            key = values.get("data-measurement") or values.get("data-assessment")
            if key:
                self.marked.setdefault((values["data-finding"] or "", key), set()).add(data.strip())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def environment() -> jinja2.Environment:
    return draft_environment(jinja2.FileSystemLoader(TEMPLATES))


def render(environment: jinja2.Environment, findings: Findings, template: str = "prostate_mri") -> Draft:
    return findings_to_draft(findings, environment, template)


def density_by_ellipsoid() -> Finding:
    gland = build_gland()
    return dataclasses.replace(
        gland,
        measurements=tuple(
            dataclasses.replace(m, method=codes.ELLIPSOID) if m.key == "psa_density" else m for m in gland.measurements
        ),
    )


@pytest.mark.parametrize("template", ["prostate_mri", "no_such_protocol"])
def test_every_number_is_marked_with_its_finding_in_both(environment: jinja2.Environment, template: str) -> None:
    findings = build_findings()
    draft = render(environment, findings, template)
    page = Page(draft.html)
    for finding in findings.findings:
        for m in finding.measurements:
            assert f"{m.text} {m.unit.value}" in page.marked[finding.tracking_id, m.key]
            row = next(line for line in draft.text.splitlines() if f"[{finding.tracking_id}/{m.key}]" in line)
            assert f" {m.text} {m.unit.value} " in row
        for a in finding.assessments:
            assert a.score in page.marked[finding.tracking_id, a.key]
            assert f"[{finding.tracking_id}/{a.key}]" in draft.text
        assert finding.tracking_uid in draft.text
        assert finding.tracking_uid in page.text


def test_html_stands_alone_and_is_well_formed(environment: jinja2.Environment) -> None:
    html = render(environment, build_findings()).html
    page = Page(html)
    assert html.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert page.links
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?:", html)
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    assert "<th scope=" in html
    assert "<th>" not in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_text_is_at_most_eighty_columns(environment: jinja2.Environment) -> None:
    for template in ("prostate_mri", "generic"):
        text = render(environment, build_findings(), template).text
        assert max(map(len, text.splitlines())) <= TEXT_WIDTH
        assert not re.search(r"[ \t]+$", text, re.MULTILINE)


def test_the_report_follows_the_pirads_structure(environment: jinja2.Environment) -> None:
    text = render(environment, build_findings(findings=(density_by_ellipsoid(), build_lesion()))).text
    order = ["CLINICAL DATA", "TECHNIQUE", "PROSTATE GLAND", "LESIONS", "IMPRESSION", "LEFT BLANK"]
    places = [text.index(f"\n{heading}") for heading in order]
    assert places == sorted(places)
    assert "13 ng/mL on 2026-02-01" in text
    assert "[Observation/psa1]" in text
    assert "= PSA 13 ng/mL / 50.0 mL (volume by ellipsoid)" in text
    assert "not acquired; DCE counts as negative (PI-RADS v2.1)" in text
    assert "DWI 4 gives" in text
    assert "- DCE: no dynamic contrast series in the study" in text


def test_density_without_a_method_names_no_volume(environment: jinja2.Environment) -> None:
    draft = render(environment, build_findings())
    assert "= PSA" not in draft.text
    assert "= PSA" not in Page(draft.html).text


def test_impression_lists_lesions_by_category(environment: jinja2.Environment) -> None:
    lesions = (build_lesion(1, codes.LEFT, "2"), build_lesion(2), build_lesion(3, score="5"))
    text = render(environment, build_findings(lesions=lesions)).text
    listed = re.findall(r"^  \d\. (Lesion \d)", text, re.MULTILINE)
    assert listed == ["Lesion 3", "Lesion 2", "Lesion 1"]


def test_ai_text_is_marked_on_top_and_in_each_section(environment: jinja2.Environment) -> None:
    draft = render(environment, build_findings())
    assert "AI-PROPOSED, UNVERIFIED, PRELIMINARY" in draft.text.splitlines()[1]
    for heading in ("PROSTATE GLAND", "LESIONS", "IMPRESSION"):
        assert re.search(rf"^{heading} +\[AI-proposed, unverified\]$", draft.text, re.MULTILINE)
    page = Page(draft.html)
    assert page.text.count("AI-proposed, unverified") == 5
    assert page.text.index("AI-PROPOSED, UNVERIFIED, PRELIMINARY") < page.text.index("Patient")
    assert "prostate_reference version 1, Wetread project" in page.text


@pytest.mark.parametrize("status", ["final", "amended", "corrected", "entered-in-error"])
def test_other_statuses_are_not_called_unverified(environment: jinja2.Environment, status: str) -> None:
    draft = render(environment, build_findings(status=status))
    assert "UNVERIFIED" not in draft.text.upper()
    assert ("WITHDRAWN" in draft.text) == (status == "entered-in-error")


def test_hostile_strings_stay_text(environment: jinja2.Environment) -> None:
    context = build_context(
        order=ContextOrder(HOSTILE, reason=HOSTILE, requester=HOSTILE), source=HOSTILE, missing=(HOSTILE,)
    )
    lesion = dataclasses.replace(build_lesion(), title=HOSTILE, notes=(HOSTILE,))
    findings = build_findings(
        lesions=(lesion,),
        context=context,
        patient=PatientIdentity(HOSTILE, HOSTILE, f"{HOSTILE}^{HOSTILE}", date(1961, 5, 6), "M"),
        study_description=HOSTILE,
        blanks=(Blank(HOSTILE, HOSTILE),),
        technique=(HOSTILE,),
        warnings=(HOSTILE,),
    )
    for template in ("prostate_mri", "generic"):
        draft = render(environment, findings, template)
        page = Page(draft.html)
        assert "script" not in page.tags
        assert "<script>alert(1)</script>{{7*7}}" in page.text
        assert "<U+0007><U+000D><U+000A>IMPRESSION<U+202E>" in page.text
        for output in (draft.text, draft.html):
            assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", output)
            assert output.encode()
        assert len(re.findall(r"^IMPRESSION", draft.text, re.MULTILINE)) == 1


def test_a_name_of_ten_thousand_characters_fits(environment: jinja2.Environment) -> None:
    name = "X" * 10_000
    draft = render(environment, build_findings(patient=PatientIdentity("P", "", name)))
    assert max(map(len, draft.text.splitlines())) <= TEXT_WIDTH
    assert draft.text.count("X") == 10_000
    assert name in Page(draft.html).text


@pytest.mark.parametrize("template", ["prostate_mri", "generic"])
def test_nothing_known_says_so(environment: jinja2.Environment, template: str) -> None:
    bare = build_findings(
        lesions=(),
        findings=(),
        context=ClinicalContext("none", missing=("patient: not in the bundle",)),
        patient=PatientIdentity(""),
        psa=None,
        study_date=None,
        study_description="",
        accession_number="",
        patient_age="",
        technique=(),
        roles=(),
        blanks=tuple(Blank(name, "not found") for name in ("PSA", "gland")),
    )
    draft = render(environment, bare, template)
    for words in ("none found", "not stated", "No lesion was proposed by the model", "patient: not in the bundle"):
        assert words in draft.text
        assert words in Page(draft.html).text


def test_a_lesion_without_category_comes_last_and_says_so(environment: jinja2.Environment) -> None:
    bare = dataclasses.replace(build_lesion(1), assessments=(), measurements=(), confidence=None, evidence=())
    draft = render(environment, build_findings(findings=(bare, build_lesion(2, score="2")), assessments=()))
    assert "Category:                  left blank, no rule gave one" in draft.text
    assert re.findall(r"^  \d\. (Lesion \d)", draft.text, re.MULTILINE) == ["Lesion 2", "Lesion 1"]
    assert "Overall category: left blank" in Page(draft.html).text


def test_a_template_cannot_leave_the_sandbox_nor_use_unknown_names() -> None:
    def make(source: str) -> jinja2.Environment:
        return draft_environment(jinja2.DictLoader({"t.txt.j2": source, "t.html.j2": ""}))

    with pytest.raises(SecurityError):
        findings_to_draft(build_findings(), make("{{ findings.__class__.__mro__ }}"), "t")
    with pytest.raises(jinja2.UndefinedError):
        findings_to_draft(build_findings(), make("{{ nobody_gives_this }}"), "t")


def test_words_for_names_and_ages() -> None:
    assert format_person("Yamada^Tarou=山田^太郎") == "Yamada, Tarou"
    assert format_person("=山田^太郎") == "山田, 太郎"
    assert (format_person("^"), format_person("Solo")) == ("not stated", "Solo")
    assert (format_age("064Y"), format_age("011M"), format_age(""), format_age("old")) == (
        "64 years",
        "11 months",
        "not stated",
        "old",
    )
    assert make_printable(("a\x00", 1, None)) == ("a<U+0000>", 1, None)


def test_what_the_context_lacks_is_said_once(environment: jinja2.Environment) -> None:
    reason = "PSA: no usable value"
    findings = build_findings(
        context=build_context(missing=(reason, "order: none")), blanks=(Blank("Clinical context", reason),)
    )
    draft = render(environment, findings)
    assert draft.text.count(reason) == 1
    assert Page(draft.html).text.count(reason) == 1
    assert "order: none" in draft.text
