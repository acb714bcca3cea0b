"""Ways in which a rendering could be wrong about a comparison: each breaks one thing in `build_compared`'s bytes.

Every number of the comparison is broken in every rendering that states it, and every other statement once.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydicom.dataset import Dataset

from mappings.model.changes import STATUS_CODES, LesionChange
from mappings.model.findings import Findings
from mappings.model.ids import derive_uid
from tests.comparisons import PRIOR_UID, build_compared
from tests.mutations_dicom import (
    SR,
    content_items,
    edit_dicom,
    edit_sr,
    measurement_groups,
    name_of_item,
    set_answer,
    set_number,
    set_unit,
)
from tests.mutations_text import FHIR, HTML, ORU, TEXT, Contents, component, edit_fhir, obx, quantity, recode, swap

Change = Callable[[Contents], None]
Mutation = tuple[str, Change, str]
PRIOR_LESION_UID = derive_uid("test-prior-job", "lesion-1")
DAY, OTHER_DAY = "2025-03-04", "2025-03-05"
IN_TEXT = {
    "prior": r"before {}",
    "difference": r"difference [+]{}",
    "percent": r"[(][+]{}%[)]",
    "per_year": r"per year [+]{}",
    "percent_per_year": r"[(][+]{}%/a[)]",
    "doubling_time": r"time: {}",
}
"""How the text draft states each kind of number; a space may be a line break."""


@dataclass(frozen=True)
class Stated:
    """One number of the comparison: its finding, OBX-4 group and title, the row and kind of the draft, its key."""

    where: str
    group: str
    title: str
    row: str
    kind: str
    key: str
    text: str

    @property
    def wrong(self) -> str:
        """Another number with as many digits."""
        return f"{self.text[:-1]}{(int(self.text[-1]) + 1) % 10}"


def first_row(findings: Findings) -> LesionChange:
    assert findings.comparison is not None
    return findings.comparison.lesions[0]


def stated_numbers(findings: Findings) -> Iterator[Stated]:
    """Every number of a change."""
    assert findings.comparison is not None
    owners = (
        ("gland", "1", "Prostate gland", findings.comparison.gland),
        ("lesion-1", "2", "Lesion 1", first_row(findings).changes),
    )
    for where, group, title, changes in owners:
        for c in changes:
            yield Stated(where, group, title, f"{c.key}/change", "prior", f"{c.key}_prior", c.prior.text)
            for kind in ("difference", "percent", "per_year", "percent_per_year"):
                m = getattr(c, kind)
                yield Stated(where, group, title, f"{c.key}/change", kind, m.key, m.text)
    doubling = first_row(findings).doubling_time
    assert doubling is not None
    yield Stated("lesion-1", "2", "Lesion 1", "doubling_time", "doubling_time", "doubling_time", doubling.text)


def break_text(number: Stated) -> Change:
    """Another digit where the row with this mark states the number."""

    def change(contents: Contents) -> None:
        whole = contents[TEXT].decode()
        end = whole.index(f"[{number.where}/{number.row}]")
        pattern = IN_TEXT[number.kind].format(f"(?P<n>{re.escape(number.text)})").replace(" ", r"\s+")
        *_, found = re.finditer(pattern, whole[:end])
        contents[TEXT] = (whole[: found.start("n")] + number.wrong + whole[found.end("n") :]).encode()

    return change


def break_html(number: Stated) -> Change:
    """Another digit in the marked number."""

    def change(contents: Contents) -> None:
        mark = f'data-finding="{number.where}" data-measurement="{number.key}"'
        new, count = re.subn(
            rf"({mark}[^>]*>[+]?){re.escape(number.text)}", rf"\g<1>{number.wrong}", contents[HTML].decode()
        )
        assert count == 1
        contents[HTML] = new.encode()

    return change


def break_numbers(findings: Findings) -> Iterator[tuple[str, Mutation]]:
    for n in stated_numbers(findings):
        name, wrong = f"{n.where} {n.key}", re.escape(n.wrong)
        said = rf"{n.where}: .*{re.escape(n.text)}.*{wrong}"
        edit = component(n.key, quantity(value=float(n.wrong)))
        yield f"sr: {name}", (SR, edit_sr(n.where, n.key, set_number(n.wrong)), said)
        yield f"oru: {name}", (ORU, obx(n.group, f"{n.key}^", f"|{n.text}|", f"|{n.wrong}|"), said)
        yield f"fhir: {name}", (FHIR, edit_fhir("Observation", edit, n.title), rf"{n.where}: {n.key}: expected")
        yield f"text: {name}", (TEXT, break_text(n), rf"{n.where}: {n.row}: .*{wrong}")
        yield f"html: {name}", (HTML, break_html(n), rf"{n.where}: {n.key}: .*{wrong}")


def edit_uid(uid: str) -> Callable[[Dataset], None]:
    return lambda item: setattr(item, "UID", uid)


def edit_words(old: str, new: str) -> Callable[[Dataset], None]:
    def edit(item: Dataset) -> None:
        assert old in item.TextValue
        item.TextValue = item.TextValue.replace(old, new)

    return edit


def drop_item(where: str, concept: str) -> Change:
    """Takes an item out of a measurement group."""

    def edit(dataset: Dataset) -> None:
        for group in measurement_groups(dataset):
            items = group.ContentSequence
            if any(i.get("TextValue") == where for i in items):
                (index,) = [n for n, i in enumerate(items) if name_of_item(i) == concept]
                del items[index]

    return edit_dicom(SR, edit)


def edit_last_comment(old: str, new: str) -> Change:
    """Other words in the last comment of the study's group."""
    return edit_dicom(SR, lambda dataset: edit_words(old, new)(content_items(dataset, "study", "121106")[-1]))


def text_of(key: str, value: str) -> Callable[[dict[str, Any]], None]:
    return component(key, lambda part: part.update(valueString=value))


def exchange_columns(contents: Contents) -> None:
    """Prior and current volume of lesion 1 change places, marks and all."""
    cells = rb'<td>(<span[^>]*"lesion-1" data-measurement="volume_prior".*?</span>)</td><td><strong>(.*?)</strong></td>'
    contents[HTML] = re.sub(cells, rb"<td>\2</td><td><strong>\1</strong></td>", contents[HTML])


def relabel_row(contents: Contents) -> None:
    row = rb'(<th scope="row">)Volume(</th><td><span[^>]*"lesion-1" data-measurement="volume_prior")'
    contents[HTML] = re.sub(row, rb"\1Mass\2", contents[HTML])


def drop_section(contents: Contents) -> None:
    contents[HTML] = re.sub(rb'<section aria-labelledby="comparison">.*?</section>', b"", contents[HTML], flags=re.S)


OTHERS: dict[str, Mutation] = {
    "sr: unit of a change": (SR, edit_sr("lesion-1", "volume_difference", set_unit("L")), "lesion-1: Volume, diff"),
    "sr: status": (
        SR,
        edit_sr("lesion-2", "change_status", set_answer(STATUS_CODES["matched"])),
        "lesion-2: Status",
    ),
    "sr: prior's lesion": (
        SR,
        edit_sr("lesion-1", "prior_tracking_uid", edit_uid("2.25.7")),
        "lesion-1: Tracking",
    ),
    "sr: prior's lesion dropped": (SR, drop_item("lesion-1", "prior_tracking_uid"), "lesion-1: Tracking"),
    "sr: prior's title": (
        SR,
        edit_sr("lesion-1", "121069", edit_words("Lesion 1", "Lesion 2")),
        "Previous",
    ),
    "sr: day of the prior's value": (
        SR,
        edit_sr("lesion-1", "volume_prior", lambda i: setattr(i, "ObservationDateTime", "20260304")),
        "lesion-1: Volume, prior .*taken 20250304.*taken 20260304",
    ),
    "sr: distance": (SR, edit_sr("lesion-1", "prior_distance", set_number("9.3")), "lesion-1: Distance"),
    "sr: prior study": (
        SR,
        edit_sr("study", "prior_study_uid", edit_uid("2.25.7")),
        "study: Study Inst",
    ),
    "sr: day of the prior": (SR, edit_sr("study", "111424", edit_words(DAY, OTHER_DAY)), "study: Comparison to"),
    "sr: interval": (SR, edit_sr("study", "prior_interval", set_number("366")), "study: Interval"),
    "sr: gone lesion dropped": (SR, drop_item("study", "121069"), "study: Previous Finding"),
    "sr: gone lesion": (SR, edit_sr("study", "121069", edit_words("Lesion 2", "Lesion 1")), "study: Previous Find"),
    "oru: unit of a change": (ORU, obx("2", "volume_difference^", "|mL^", "|L^"), "lesion-1: volume_difference"),
    "oru: status": (ORU, obx("3", "change_status^", "|new^", "|matched^"), "lesion-2: change_status"),
    "oru: prior's lesion": (ORU, obx("2", "prior_tracking_uid^", "|2.25.", "|2.26."), "lesion-1: prior_tracking"),
    "oru: day of the prior's value": (
        ORU,
        obx("2", "volume_prior^", "|20250304|", "|20260304|"),
        "lesion-1: volume_prior: observed",
    ),
    "oru: kind of a change": (
        ORU,
        obx("2", "volume_difference^", "difference-from-prior", "value-at-prior"),
        "lesion-1: volume_difference",
    ),
    "oru: distance": (ORU, obx("2", "prior_distance^", "|0.3|", "|9.3|"), "lesion-1: prior_distance"),
    "oru: prior study": (ORU, obx("4", "prior_study_uid^", "|2.25.", "|2.26."), "study: prior_study_uid"),
    "oru: day of the prior": (
        ORU,
        obx("4", "prior_study_date^", "|20250304|", "|20250305|"),
        "study: prior_study",
    ),
    "oru: interval": (ORU, obx("4", "prior_interval^", "|365|", "|366|"), "study: prior_interval"),
    "oru: gone lesion": (ORU, obx("4", "gone^", "|Lesion 2", "|Lesion 1"), "study: gone"),
    "oru: gone lesion's UID": (ORU, obx("4", "prior_gone_uid^", "|2.25.", "|2.26."), "study: prior_gone_uid"),
    "oru: impression": (
        ORU,
        swap(ORU, "from 0.16 to 0.31 mL", "from 0.16 to 0.13 mL", -1),
        "comparison: ",
    ),
    "oru: impression's new lesion": (
        ORU,
        swap(ORU, "Lesion 2 is new", "Lesion 1 is new", -1),
        "comparison: ",
    ),
    "fhir: unit of a change": (
        FHIR,
        edit_fhir("Observation", component("volume_difference", quantity(code="L")), "Lesion 1"),
        "lesion-1: volume_difference: unit",
    ),
    "fhir: status": (
        FHIR,
        edit_fhir("Observation", component("change_status", recode("matched")), "Lesion 2"),
        "lesion-2: change_status",
    ),
    "fhir: prior's lesion": (
        FHIR,
        edit_fhir("Observation", text_of("prior_tracking_uid", "urn:oid:2.25.7"), "Lesion 1"),
        "lesion-1: prior_tracking_uid",
    ),
    "fhir: prior's Observation": (FHIR, swap(FHIR, f"urn:oid:{PRIOR_LESION_UID}", "urn:oid:2.25.7"), "derivedFrom"),
    "fhir: prior study": (
        FHIR,
        edit_fhir("Observation", text_of("prior_study_uid", "urn:oid:2.25.7"), "Prostate gland"),
        "gland: prior_study_uid",
    ),
    "fhir: prior study as source": (
        FHIR,
        edit_fhir("Observation", lambda r: r["derivedFrom"].pop(1), "Prostate gland"),
        "gland: derivedFrom",
    ),
    "fhir: day of the prior": (
        FHIR,
        edit_fhir(
            "Observation", component("prior_study_date", lambda p: p.update(valueDateTime=OTHER_DAY)), "Lesion 2"
        ),
        "lesion-2: prior_study_date",
    ),
    "fhir: interval": (
        FHIR,
        edit_fhir("Observation", component("prior_interval", quantity(value=366)), "Lesion 1"),
        "lesion-1: prior_interval",
    ),
    "fhir: distance": (
        FHIR,
        edit_fhir("Observation", component("prior_distance", quantity(value=9.3)), "Lesion 1"),
        "lesion-1: prior_distance",
    ),
    "fhir: prior's report": (FHIR, swap(FHIR, f"{PRIOR_UID}:prostate_mri", f"{PRIOR_UID}:other"), "Provenance: entity"),
    "fhir: gone lesion": (FHIR, swap(FHIR, "Lesion 2 of 2025", "Lesion 1 of 2025"), "gland: note"),
    "fhir: conclusion": (
        FHIR,
        swap(FHIR, "Lesion 2 of that study", "Lesion 1 of that study"),
        "comparison: ",
    ),
    "text: unit of a change": (TEXT, swap(TEXT, "+0.15 mL\n", "+0.15 mm\n"), "lesion-1: volume/change"),
    "text: sign": (TEXT, swap(TEXT, "difference +0.15", "difference -0.15"), "lesion-1: volume/change"),
    "text: day of the prior": (TEXT, swap(TEXT, f"{DAY}, 365", f"{OTHER_DAY}, 365"), "prior: study"),
    "text: interval": (TEXT, swap(TEXT, "365 days", "366 days"), "prior: study"),
    "text: prior study": (TEXT, swap(TEXT, PRIOR_UID, "2.25.7"), "comparison: said"),
    "text: match": (TEXT, swap(TEXT, "Lesion 1, 0.3 mm", "Lesion 2, 0.3 mm"), "lesion-1: change"),
    "text: distance": (TEXT, swap(TEXT, "Lesion 1, 0.3 mm", "Lesion 1, 9.3 mm"), "lesion-1: change"),
    "text: new": (TEXT, swap(TEXT, "none, it is new", "Lesion 1"), "lesion-2: change"),
    "text: gone lesion": (TEXT, swap(TEXT, "Lesion 2 of 2025", "Lesion 1 of 2025"), "comparison: listed"),
    "text: other prior": (TEXT, swap(TEXT, "2023-05-06", "2023-06-05"), "comparison: listed"),
    "text: impression": (TEXT, swap(TEXT, "from 0.16 to", "from 0.61 to"), "comparison: "),
    "text: impression's day": (TEXT, swap(TEXT, f"Since {DAY}", f"Since {OTHER_DAY}"), "comparison: "),
    "html: unit of a change": (HTML, swap(HTML, ">+0.15 mL<", ">+0.15 mm<"), "lesion-1: volume_difference"),
    "html: sign": (HTML, swap(HTML, ">+0.15 mL<", ">-0.15 mL<"), "lesion-1: volume_difference"),
    "html: day of the prior": (HTML, swap(HTML, f"study of {DAY}", f"study of {OTHER_DAY}"), "comparison: said"),
    "html: day over a table": (HTML, swap(HTML, f'col">{DAY}', f'col">{OTHER_DAY}'), "gland: head of the table"),
    "html: interval": (HTML, swap(HTML, "365 days", "366 days"), "comparison: said"),
    "html: prior study": (HTML, swap(HTML, PRIOR_UID, "2.25.7"), "comparison: said"),
    "html: columns exchanged": (HTML, exchange_columns, "lesion-1: volume: columns"),
    "html: row's label": (HTML, relabel_row, "lesion-1: volume: label of the change"),
    "html: match": (HTML, swap(HTML, "prior: Lesion 1", "prior: Lesion 2"), "lesion-1: said"),
    "html: new": (HTML, swap(HTML, "none, it is new", "Lesion 1"), "lesion-2: said"),
    "html: gone lesion": (HTML, swap(HTML, "Lesion 2 of 2025", "Lesion 1 of 2025"), "comparison: listed"),
    "html: other prior": (HTML, swap(HTML, "2023-05-06", "2023-06-05"), "comparison: listed"),
    "html: impression": (HTML, swap(HTML, "from 0.16 to", "from 0.61 to"), "comparison: "),
    "html: section dropped": (HTML, drop_section, "comparison: section: expected 'yes', found 'no'"),
}


UNSURE: dict[str, Mutation] = {
    "sr: candidate": (SR, edit_sr("lesion-1", "prior_candidate", edit_uid("2.25.7")), "lesion-1: Tracking UID of a"),
    "sr: candidate's title": (SR, edit_sr("lesion-1", "121069", edit_words("Lesion 1", "Lesion 3")), "Previous"),
    "sr: note on the whole": (SR, edit_last_comment("protocol other", "protocol mine"), "study: Comment"),
    "oru: candidate": (ORU, swap(ORU, "|2.25.", "|2.26.", -1), "lesion-1: prior_candidate"),
    "oru: note on the whole": (ORU, swap(ORU, "read by protocol other", "read by protocol mine"), "study: change_note"),
    "oru: note on a lesion": (ORU, swap(ORU, "|By its place", "|By its face"), "lesion-1: change_note"),
    "oru: impression": (ORU, swap(ORU, "could not be matched", "could be matched", -1), "comparison: "),
    "fhir: candidate": (
        FHIR,
        edit_fhir("Observation", text_of("prior_candidate", "urn:oid:2.25.7"), "Lesion 1"),
        "lesion-1: prior_candidate",
    ),
    "fhir: note on the whole": (FHIR, swap(FHIR, "read by protocol other", "read by protocol mine"), "gland: note"),
    "fhir: note on a lesion": (FHIR, swap(FHIR, "By its place", "By its face"), "lesion-1: note"),
    "text: candidates": (TEXT, swap(TEXT, "decided: Lesion 1 or Lesion 2", "decided: Lesion 1"), "lesion-1: change"),
    "text: note on the whole": (TEXT, swap(TEXT, "protocol other", "protocol mine"), "comparison: said"),
    "text: note on a lesion": (TEXT, swap(TEXT, "match by eye", "match by ear"), "lesion-1: said"),
    "html: candidates": (HTML, swap(HTML, "decided: Lesion 1 or Lesion 2", "decided: Lesion 1"), "lesion-1: said"),
    "html: note on the whole": (HTML, swap(HTML, "protocol other", "protocol mine"), "comparison: said"),
    "html: note on a lesion": (HTML, swap(HTML, "match by eye", "match by ear"), "lesion-1: said"),
}
"""The same for `build_ambiguous`."""

NONE_FOUND: dict[str, Mutation] = {
    "sr": (SR, edit_last_comment("No prior", "A prior"), "study: Comment"),
    "fhir": (FHIR, swap(FHIR, "No prior study was found", "A prior study was found"), "gland: note"),
    "text": (TEXT, swap(TEXT, "No prior study was found", "A prior study was found"), "comparison: said"),
    "text: section dropped": (TEXT, swap(TEXT, "\nCOMPARISON", "\nTHE COMPARISON"), "comparison: section"),
    "html": (HTML, swap(HTML, "No prior study was found", "A prior study was found"), "comparison: said"),
}
"""The same for `build_not_found`."""

CHANGE_MUTATIONS: dict[str, Mutation] = {**dict(break_numbers(build_compared())), **OTHERS}
"""Artifact that is changed, how, and what a message of the checker must say (a regular expression)."""
