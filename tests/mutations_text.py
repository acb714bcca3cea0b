"""Ways in which a text rendering could be wrong: each breaks one thing in the bytes of the default result."""

import json
import re
from collections.abc import Callable
from typing import Any

from mappings.model import codes

Contents = dict[str, bytes]
Change = Callable[[Contents], None]
ORU, FHIR, TEXT, HTML = "oru.hl7", "fhir-bundle.json", "report.txt", "report.html"
LEFT = codes.LEFT


def swap(name: str, old: str, new: str, count: int = 1) -> Change:
    """Replaces the first `count` places of a text artifact (all for -1)."""

    def change(contents: Contents) -> None:
        text = contents[name].decode()
        assert old in text
        contents[name] = text.replace(old, new, count).encode()

    return change


def obx(tracking: str, question: str, old: str, new: str) -> Change:
    """Replaces in the OBX whose OBX-4 group and OBX-3 are these."""

    def change(contents: Contents) -> None:
        lines = contents["oru.hl7"].decode().split("\r")
        (index,) = (i for i, s in enumerate(lines) if f"|{tracking}." in s and question in s.split("|")[3])
        assert old in lines[index]
        lines[index] = lines[index].replace(old, new, 1)
        contents["oru.hl7"] = "\r".join(lines).encode()

    return change


def edit_lines(edit: Callable[[list[str]], list[str]]) -> Change:
    def change(contents: Contents) -> None:
        contents["oru.hl7"] = "\r".join(edit(contents["oru.hl7"].decode().split("\r"))).encode()

    return change


def edit_fhir(kind: str, edit: Callable[[dict[str, Any]], None], text: str = "") -> Change:
    """Edits the first resource of a type (and code.text)."""

    def change(contents: Contents) -> None:
        bundle = json.loads(contents["fhir-bundle.json"])
        resources = [e["resource"] for e in bundle["entry"] if e["resource"]["resourceType"] == kind]
        edit(next(r for r in resources if not text or r["code"]["text"] == text))
        contents["fhir-bundle.json"] = json.dumps(bundle).encode()

    return change


def component(key: str, edit: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def change(resource: dict[str, Any]) -> None:
        edit(next(c for c in resource["component"] if any(x["code"] == key for x in c["code"]["coding"])))

    return change


def edit_entries(edit: Callable[[list[dict[str, Any]]], None]) -> Change:
    def change(contents: Contents) -> None:
        bundle = json.loads(contents["fhir-bundle.json"])
        edit(bundle["entry"])
        contents["fhir-bundle.json"] = json.dumps(bundle).encode()

    return change


def entry(entries: list[dict[str, Any]], text: str) -> dict[str, Any]:
    return next(e for e in entries if e["resource"].get("code", {}).get("text") == text)


def quantity(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda part: part["valueQuantity"].update(changes)


def recode(value: str) -> Callable[[dict[str, Any]], None]:
    return lambda part: part["valueCodeableConcept"]["coding"][0].update(code=value)


TEXT_MUTATIONS: dict[str, tuple[str, Change, str]] = {
    # ORU
    "oru: last digit": (ORU, obx("2", "^volume^", "|0.31|", "|0.32|"), r"lesion-1: volume: .*0\.31.*0\.32"),
    "oru: unit": (ORU, obx("2", "^diameter_3d^", "|mm^", "|cm^"), "lesion-1: diameter_3d: .*mm.*cm"),
    "oru: method": (ORU, obx("1", "^volume_voxels^", "126030", "126029"), "gland: volume_voxels"),
    "oru: label": (ORU, obx("1", "^volume_voxels^", "voxel count", "ellipsoid"), "gland: volume_voxels: label"),
    "oru: side": (ORU, obx("2", "^side^", "24028007^Right", "7771000^Left"), r"lesion-1: side: .*Right.*Left"),
    "oru: zone": (ORU, obx("2", "^zone^Zone", "279706003^Peripheral", "399384005^Transition"), "lesion-1: zone"),
    "oru: level": (ORU, obx("2", "level", "|mid|", "|apex|"), "lesion-1: level: .*mid.*apex"),
    "oru: category": (ORU, obx("2", "^pirads^", "RID50299", "RID50300"), "lesion-1: pirads: .*RID50300"),
    "oru: score": (ORU, obx("2", "^pirads^", "^4^", "^5^"), "lesion-1: pirads: .*= 4.*= 5"),
    "oru: flag": (ORU, obx("2", "^pirads^", "|A|", "||"), "lesion-1: pirads: .*flag A"),
    "oru: input": (ORU, obx("2", "^pirads.DWI score^", "RID50317", "RID50318"), r"lesion-1: pirads\.DWI score"),
    "oru: overall": (ORU, obx("4", "^pirads_overall^", "RID50292", "RID50293"), "study: pirads_overall"),
    "oru: one result final": (ORU, obx("2", "^volume^", "|P|", "|F|"), "message: OBX-11: .*found 'F'"),
    "oru: order final": (ORU, swap(ORU, "|RAD|P|", "|RAD|F|"), "message: OBR-25: expected 'P', found 'F'"),
    "oru: control id": (
        ORU,
        edit_lines(lambda s: [re.sub(r"\|WR[0-9A-F]{18}\|", "|WR0|", s[0]), *s[1:]]),
        "message: MSH-10",
    ),
    "oru: patient id": (ORU, swap(ORU, "|TEST-001^", "|TEST-002^"), "message: PID-3"),
    "oru: patient name": (ORU, swap(ORU, "|Phantom^", "|Fantom^"), "message: PID-5"),
    "oru: accession": (ORU, swap(ORU, "||ACC-1|", "||ACC-2|"), "message: OBR-18"),
    "oru: placer": (ORU, swap(ORU, "OBR|1|PLAC-1|", "OBR|1|PLAC-2|"), "message: OBR-2"),
    "oru: study": (ORU, obx("4", "110180", "|2.25.", "|2.26."), "study: Study Instance UID"),
    "oru: tracking UID": (ORU, obx("3", "112040", "|2.25.", "|2.26."), "lesion-2: Tracking Unique Identifier"),
    "oru: model": (ORU, obx("2", "^volume^", "prostate_reference^1", "prostate_reference^2"), "message: OBX-18"),
    "oru: finding dropped": (
        ORU,
        edit_lines(lambda s: [x for x in s if not re.match(r"OBX\|\d+\|[A-Z]+\|[^|]*\|3\.", x)]),
        "lesion-2: .*nothing",
    ),
    "oru: finding doubled": (
        ORU,
        edit_lines(lambda s: [*s[:-1], *(x for x in s if re.match(r"OBX\|\d+\|[A-Z]+\|[^|]*\|3\.", x)), ""]),
        "lesion-2: volume: expected no more",
    ),
    "oru: narrative": (ORU, edit_lines(lambda s: [x for x in s if "5.30|" not in x]), "message: narrative"),
    "oru: impression": (
        ORU,
        edit_lines(lambda s: [x.replace("category 4; right", "category 5; right") if "19005-8" in x else x for x in s]),
        "lesion-1: impression: .*category 4",
    ),
    # FHIR
    "fhir: last digit": (
        FHIR,
        edit_fhir("Observation", component("volume", quantity(value=0.32)), "Lesion 1"),
        "lesion-1: volume: .*0.32",
    ),
    "fhir: unit": (
        FHIR,
        edit_fhir("Observation", component("volume", quantity(code="L")), "Lesion 1"),
        "lesion-1: volume: unit",
    ),
    "fhir: side": (FHIR, edit_fhir("Observation", component("side", recode(LEFT.value)), "Lesion 1"), "lesion-1: side"),
    "fhir: sector": (
        FHIR,
        edit_fhir("Observation", lambda r: r["bodySite"]["coding"][0].update(code="1"), "Lesion 1"),
        "lesion-1: bodySite",
    ),
    "fhir: category": (
        FHIR,
        edit_fhir("Observation", component("pirads", recode("RID50300")), "Lesion 1"),
        "lesion-1: pirads: .*RID50300",
    ),
    "fhir: input": (
        FHIR,
        edit_fhir("Observation", component("pirads.DWI_score", recode("RID50318")), "Lesion 1"),
        "DWI_score",
    ),
    "fhir: overall": (
        FHIR,
        edit_fhir("Observation", recode("RID50293"), "PI-RADS v2.1 overall category"),
        "pirads_overall: value",
    ),
    "fhir: density": (
        FHIR,
        edit_fhir("Observation", quantity(value=0.62), "PSA density"),
        "psa_density: value: .*0.26.*0.62",
    ),
    "fhir: status of a finding": (
        FHIR,
        edit_fhir("Observation", lambda r: r.update(status="final"), "Lesion 1"),
        "lesion-1: status",
    ),
    "fhir: status of the report": (
        FHIR,
        edit_fhir("DiagnosticReport", lambda r: r.update(status="final")),
        "DiagnosticReport: status",
    ),
    "fhir: subject": (
        FHIR,
        edit_fhir("Observation", lambda r: r["subject"].update(reference="Patient/p2"), "Lesion 1"),
        "lesion-1: subject",
    ),
    "fhir: subject of the report": (
        FHIR,
        edit_fhir("DiagnosticReport", lambda r: r["subject"].update(reference="Patient/p2")),
        "DiagnosticReport: subject",
    ),
    "fhir: order": (
        FHIR,
        edit_fhir("DiagnosticReport", lambda r: r["basedOn"][0].update(reference="ServiceRequest/s2")),
        "basedOn",
    ),
    "fhir: accession": (
        FHIR,
        edit_fhir("ImagingStudy", lambda r: r["identifier"][1].update(value="ACC-2")),
        "ImagingStudy: identifier",
    ),
    "fhir: study": (
        FHIR,
        edit_fhir("ImagingStudy", lambda r: r["identifier"][0].update(value="urn:oid:2.25.7")),
        "ImagingStudy",
    ),
    "fhir: identifier of a finding": (
        FHIR,
        edit_fhir("Observation", lambda r: r["identifier"][0].update(value="urn:oid:2.25.7"), "Lesion 1"),
        "Observation 2.25.7",
    ),
    "fhir: report identifier": (
        FHIR,
        edit_fhir("DiagnosticReport", lambda r: r["identifier"][0].update(value="x")),
        "DiagnosticReport: ident",
    ),
    "fhir: model version": (
        FHIR,
        edit_fhir("Device", lambda r: r["version"][0].update(value="2")),
        "Device: version: expected '1', found '2'",
    ),
    "fhir: finding dropped": (
        FHIR,
        edit_entries(lambda e: e.remove(entry(e, "Lesion 2"))),
        "lesion-2: resource: .*found nothing",
    ),
    "fhir: finding doubled": (
        FHIR,
        edit_entries(lambda e: e.append(entry(e, "Lesion 2"))),
        "lesion-2: resource: expected no more",
    ),
    "fhir: result not listed": (
        FHIR,
        edit_fhir("DiagnosticReport", lambda r: r["result"].pop()),
        "DiagnosticReport: result",
    ),
    "fhir: conclusion": (
        FHIR,
        edit_fhir("DiagnosticReport", lambda r: r.update(conclusion=r["conclusion"].replace("; left", "; right"))),
        "lesion-2: impression: .*'Left'",
    ),
    "fhir: other revision": (
        FHIR,
        edit_fhir("Provenance", lambda r: r["meta"]["tag"][0].update(code="x")),
        "Provenance: tag",
    ),
    "fhir: attachment": (
        FHIR,
        edit_fhir("DiagnosticReport", lambda r: r["presentedForm"][1].update(data="eA==")),
        "presentedForm text/plain",
    ),
    "fhir: attachment's hash": (
        FHIR,
        edit_fhir("DiagnosticReport", lambda r: r["presentedForm"][0].update(hash="eA==")),
        "text/html: hash",
    ),
    # Drafts
    "text: number": (
        TEXT,
        swap(TEXT, "0.31 mL", "0.32 mL"),
        r"lesion-1: volume: expected '0\.31 mL', found '0\.32 mL'",
    ),
    "text: unit": (TEXT, swap(TEXT, "44.3 mL", "44.3 mm"), "gland: volume_voxels: .*mL.*mm"),
    "text: density": (TEXT, swap(TEXT, "0.26 ng/mL/mL", "0.27 ng/mL/mL"), "gland: psa_density"),
    "text: label": (TEXT, swap(TEXT, "Mean ADC:", "10th percentile ADC:"), "lesion-1: adc_mean: label"),
    "text: PSA": (TEXT, swap(TEXT, "13 ng/mL on", "31 ng/mL on"), "document: PSA"),
    "text: side": (
        TEXT,
        swap(TEXT, "Location:                  right", "Location:  left"),
        "lesion-1: row: .*right.*left",
    ),
    "text: side in the impression": (TEXT, swap(TEXT, "category 4; right", "category 4; left"), "lesion-1: impression"),
    "text: category": (
        TEXT,
        swap(TEXT, "   4, PI-RADS 4 - High (lesion)", "   5, PI-RADS 4 - High (lesion)"),
        "lesion-1: pirads",
    ),
    "text: input": (TEXT, swap(TEXT, "DWI score:               4", "DWI score:               3"), "lesion-1: pirads"),
    "text: derivation": (
        TEXT,
        swap(TEXT, "DWI 4 gives", "DWI 5 gives"),
        "lesion-1: sentence: .*DWI 4 gives",
    ),
    "text: banner": (TEXT, swap(TEXT, "AI-PROPOSED, UNVERIFIED, PRELIMINARY: no", "FINAL: no"), "banner above"),
    "text: status": (TEXT, swap(TEXT, "revision 1, preliminary", "revision 1, final"), "document: Result"),
    "text: revision": (TEXT, swap(TEXT, "revision 1,", "revision 2,"), "document: Result"),
    "text: patient id": (TEXT, swap(TEXT, "TEST-001", "TEST-002"), "document: Patient ID"),
    "text: accession": (TEXT, swap(TEXT, "ACC-1", "ACC-2"), "document: Accession number"),
    "text: study": (TEXT, swap(TEXT, "  Study 2.25", "  Study 2.26"), "document: Study Instance UID"),
    "text: lesion in the impression": (
        TEXT,
        swap(TEXT, "12.1 mm. [lesion-2]", "12.9 mm. [lesion-2]"),
        "lesion-2: impress",
    ),
    "text: a lesion of nobody": (
        TEXT,
        swap(TEXT, "Lesion 2  [lesion-2]\n", "Lesion 3  [lesion-3]\n\nLesion 2  [lesion-2]\n"),
        "lesion-3: heading",
    ),
    "text: blank dropped": (TEXT, swap(TEXT, "  - DCE: no dynamic", "  DCE: no dynamic"), "document: left blank"),
    "text: model version": (TEXT, swap(TEXT, "prostate_reference version 1", "prostate_reference version 2"), "model"),
    "html: number": (
        HTML,
        swap(HTML, ">0.31 mL<", ">0.32 mL<"),
        r"lesion-1: volume: expected 'no more', found|found '0\.32",
    ),
    "html: unit": (HTML, swap(HTML, ">812 um2/s<", ">812 mm2/s<"), "lesion-1: adc_mean"),
    "html: method": (HTML, swap(HTML, "<td>Mean</td>", "<td>Median</td>"), "lesion-1: adc_mean: method"),
    "html: side": (HTML, swap(HTML, "Location: right", "Location: left"), "lesion-1: location"),
    "html: side in the impression": (HTML, swap(HTML, "</span>; right", "</span>; left"), "lesion-1: impression"),
    "html: score": (HTML, swap(HTML, '(lesion)">4</span>', '(lesion)">5</span>'), "lesion-1: pirads: score"),
    "html: input": (HTML, swap(HTML, '"DWI score">4<', '"DWI score">3<'), "lesion-1: pirads: why"),
    "html: banner": (HTML, swap(HTML, "AI-PROPOSED, UNVERIFIED, PRELIMINARY", "FINAL"), "banner above"),
    "html: patient id": (HTML, swap(HTML, "TEST-001", "TEST-002"), "document: Patient ID"),
    "html: accession": (HTML, swap(HTML, "<dd>ACC-1", "<dd>ACC-2"), "document: Accession number"),
    "html: evidence": (HTML, swap(HTML, "Shown on t2w slice 5", "Shown on t2w slice 6"), "lesion-1: evidence"),
    "html: article dropped": (
        HTML,
        lambda c: c.update({HTML: re.sub(rb'<article id="finding-2".*?</article>', b"", c[HTML], flags=re.S)}),
        "lesion-2: heading: .*nothing",
    ),
    "html: article doubled": (
        HTML,
        lambda c: c.update({HTML: re.sub(rb'(<article id="finding-2".*?</article>)', rb"\1\1", c[HTML], flags=re.S)}),
        "lesion-2: heading: expected no more",
    ),
    "html: tracking UID": (HTML, swap(HTML, "<td><code>2.25.1401", "<td><code>2.25.1402"), "lesion-1: tracking UID"),
}
"""Artifact that is changed, how, and what a message of the checker must say (a regular expression)."""
