"""Protocol files: ours is valid, and each kind of mistake names file, line and what to write instead."""

import hashlib
import re
from pathlib import Path

import pytest

from mappings.model.protocol import Condition
from middleware.errors import SettingsError
from middleware.intake.protocols import BUNDLED, load_protocol, load_protocols

FILE = BUNDLED / "prostate_mri.yaml"
TEXT = FILE.read_text(encoding="utf-8")


def write(folder: Path, old: str, new: str, name: str = "site.yaml") -> Path:
    """The bundled protocol with its first `old` replaced."""
    assert old in TEXT
    file = folder / name
    file.write_text(TEXT.replace(old, new, 1), encoding="utf-8")
    return file


def complaints(file: Path) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        load_protocol(file)
    return [line.replace(str(file), "site.yaml") for line in str(refused.value).splitlines()]


def line_of(text: str, start: str) -> int:
    """The line (from 1) of the first occurrence of `start`."""
    return text[: text.index(start)].count("\n") + 1


def test_bundled_protocol_is_valid_and_named_by_its_digest() -> None:
    (loaded,) = [p for name, p in load_protocols().items() if name == "prostate_mri"]
    protocol = loaded.protocol
    assert loaded.digest == hashlib.sha256(FILE.read_bytes()).hexdigest()
    assert [r.name for r in protocol.roles] == ["t2w", "adc", "hbv", "dce"]
    assert [r.required for r in protocol.roles] == [True, True, True, False]
    assert protocol.role("hbv").geometry.several_b_values == "refuse"
    assert (protocol.model.name, protocol.model.version, protocol.rule) == ("prostate_reference", "1", "pirads_v2_1")
    assert protocol.model.inputs[3].shape == (3,)
    assert protocol.match[0] == Condition("modality", any_of=("MR",), say="the study holds no MR images ({value})")
    with pytest.raises(KeyError):
        protocol.role("flair")


MISTAKES = [
    ("required: false", "requierd: false", "requierd: false", "roles.3.requierd: no such setting; there are geometry,"),
    ("version: \"1\"\ntitle", "verzion: \"1\"\ntitle", "verzion", "verzion: no such setting; there are match, measure"),
    ("title: Prostate MRI, PI-RADS v2.1\n", "", "name:", "title: Field required"),
    ("attribute: body_part,", "attribute: bodypart,", "- {attribute: bodypart", "no attribute 'bodypart'; there are"),
    ("{attribute: plane, any", "{attribute: plain, any", "- {attribute: plain", "no attribute 'plain'; there are"),
    ('matches: "(?i)t2"', 'matches: "(?i)t2("', '- {attribute: description, matches: "(?i)t2("', "not a regular"),
    ('not_matches: "', 'not_matches: "[', '- {attribute: description, not_matches: "[', "not a regular expression"),
    ("role: hbv}", "role: hbw}", "- {name: hbv, datatype", "role 'hbw' is not among t2w, adc, hbv, dce"),
    ("role: hbv}", "}", "- {name: hbv, datatype", "input hbv has no role, so it is the spacing, of shape [3]"),
    ("reference_role: t2w", "reference_role: flair", "reference_role", "role 'flair' is not among t2w, adc, hbv, dce"),
    ("reference_role: t2w", "reference_role: dce", "reference_role", "role dce carries the grid and must be required"),
    ("adc_role: adc", "adc_role: ad", "adc_role", "role 'ad' is not among t2w, adc, hbv, dce"),
    ("pacs: [seg, sr, key", "pacs: [seg, oru, key", "pacs: [seg", "'oru' cannot go to pacs; it takes key_images"),
    ("ris: [oru]", "ris: [fhir_bundle]", "ris: [", "'fhir_bundle' cannot go to ris; it takes oru"),
    ("ehr: [fhir", "ehr: fhir_bundle # [", "ehr: fhir", "outputs.ehr: must be a list"),
    ("- name: hbv", "- name: dce", "- name: dce", "role dce is there twice"),
    ("rule: pirads_v2_1", "rule: pirads_v3", "rule: pirads_v3", "no rule 'pirads_v3'; there are pirads_v2_1"),
    ("rule: pirads_v2_1", "rule: pirads_v2_1\nrule: x", "rule: pirads_v2_1", "rule: is there twice"),
    ("any_of: [MR], say", "any_of: MR, say", "- {attribute: modality, any_of: MR", "match.0.any_of: must be a list"),
    ("deadline_s: 120", "deadline_s: soon", "deadline_s", "model.deadline_s: Input should be a valid number"),
    ("shape: [3]", "shape: [three]", "- {name: spacing", "model.inputs.3.shape.0: Input should be a valid integer"),
    ("maximum_age_days: 365", "maximum_age_days: year", "psa:", "measure.psa.maximum_age_days: Input should be"),
    ("volume: ellipsoid", "volume: sphere", "psa:", "measure.psa.volume: Input should be 'ellipsoid' or 'voxels'"),
    ("several_b_values: refuse", "several_b_values: all", "geometry:", "several_b_values: Input should be 'refuse'"),
    ("missing: pass", "missing: maybe", "- {attribute: sex", "missing: Input should be 'fail' or 'pass'"),
    ('["low:pixel', '["small:pixel', 'prefer: ["small', "'small:pixel_spacing_mm' is not high:ATTRIBUTE"),
    ("high:b_value", "high:b_valeu", 'prefer: ["high:b_valeu', "'high:b_valeu' is not high:ATTRIBUTE or low:ATTRIBUTE"),
    ('say: "plane is {value}', 'say: "plane is {plane}', "- {attribute: plane", "may hold {value} and no other braces"),
    ("at_least: 60, ", "", "- {attribute: echo_time_ms", "the condition compares nothing; add one of any_of, none_of"),
    ("- say: no b-value of", '- say: no {value} of', "- say: no {value}", "may hold no braces"),
    ("match:\n", "match: []\nold:\n", "match: []", "old: no such setting"),
    ("    - {name: zones, datatype: UINT8, shape: [-1, -1, -1]}\n", "", "outputs:", "they must be gland"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "where", "says"), MISTAKES)
def test_each_mistake_names_its_line(tmp_path: Path, old: str, new: str, where: str, says: str) -> None:
    file = write(tmp_path, old, new)
    matching = [c for c in complaints(file) if says in c]
    assert matching, complaints(file)
    text = file.read_text()
    start = next(text.index(line) for line in text.splitlines() if line.strip().startswith(where))
    first = text[:start].count("\n") + 1
    found = int(re.match(r"site\.yaml:(\d+): ", matching[0])[1])  # type: ignore[index]
    assert 0 <= found - first <= 1, f"{matching[0]} should name line {first}"


def test_a_site_can_change_the_policy(tmp_path: Path) -> None:
    file = write(tmp_path, "several_b_values: refuse}", "missing_slices: accept}")
    assert load_protocol(file).protocol.role("hbv").geometry.missing_slices == "accept"


def test_every_mistake_is_listed_at_once(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(TEXT.replace("rule: pirads_v2_1", "rule: x").replace("adc_role: adc", "adc_role: y"))
    assert len(complaints(file)) == 1, "a role that is not there ends the check of references"
    file.write_text(TEXT.replace("rule: pirads_v2_1", "rule: x").replace("ris: [oru]", "ris: [seg]"))
    assert len(complaints(file)) == 2


def test_reference_role_may_not_be_incomplete(tmp_path: Path) -> None:
    file = write(tmp_path, "title: T2-weighted axial\n", "title: T2\n    geometry: {uneven_spacing: accept}\n")
    assert "role t2w carries the grid: its slices may be neither missing nor uneven" in complaints(file)[0]


def test_empty_match_and_role_are_refused(tmp_path: Path) -> None:
    start, end = TEXT.index("match:"), TEXT.index("roles:")
    file = tmp_path / "site.yaml"
    file.write_text(TEXT[:start] + "match: []\n\n" + TEXT[end:])
    assert complaints(file) == [f"site.yaml:{line_of(file.read_text(), 'match:')}: match is empty: the protocol would read every study"]  # fmt: skip  # noqa: E501
    start, end = TEXT.index("    must:"), TEXT.index('    prefer: ["low')
    file.write_text(TEXT[:start] + "    must: []\n" + TEXT[end:])
    assert "role t2w must have a condition: any series would do" in complaints(file)[0]


def test_condition_with_attribute_and_any_or_with_an_empty_any_is_refused(tmp_path: Path) -> None:
    both = write(tmp_path, "{attribute: sex,", "{attribute: sex, any: [{attribute: sex, any_of: [M]}],")
    assert "a condition has either an attribute or 'any', not both" in complaints(both)[0]
    empty = write(tmp_path, "{attribute: sex, none_of: [F], missing: pass,", "{any: [],")
    assert any("'any' is empty" in c for c in complaints(empty))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "site.yaml:1: must be a mapping of settings, but is empty"),
        (b"- a\n- b\n", "site.yaml:1: must be a mapping of settings, but is a list"),
        (b"just words", "site.yaml:1: must be a mapping of settings, but is a str"),
        (b"name: x\nmatch: [a\nroles: b\n", "site.yaml:3: cannot be read as YAML: "),
        (b"name: x\n\tb: c\n", "site.yaml:2: cannot be read as YAML: "),
        (b"name: \xff\xfe\n", "site.yaml: cannot be read as YAML: "),
        (b"name: !!python/object/apply:os.system ['true']\n", "site.yaml:1: cannot be read as YAML: "),
    ],
)
def test_what_is_no_protocol_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_bytes(content)
    (complaint,) = complaints(file)
    assert complaint.startswith(says)


def test_folder_without_protocols_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no protocol files \(\*\.yaml\) there"):
        load_protocols(tmp_path)
    with pytest.raises(SettingsError, match="no protocol files"):
        load_protocols(tmp_path / "absent")


def test_two_files_of_one_name_are_refused_naming_both(tmp_path: Path) -> None:
    write(tmp_path, "name: prostate_mri", "name: prostate_mri", "a.yaml")
    write(tmp_path, "name: prostate_mri", "name: prostate_mri", "b.yaml")
    with pytest.raises(SettingsError, match=r"b\.yaml: protocol prostate_mri is also in .*a\.yaml"):
        load_protocols(tmp_path)


def test_a_site_can_have_several(tmp_path: Path) -> None:
    write(tmp_path, "name: prostate_mri", "name: prostate_mri", "a.yaml")
    write(tmp_path, "name: prostate_mri", "name: prostate_biparametric", "b.yaml")
    assert sorted(load_protocols(tmp_path)) == ["prostate_biparametric", "prostate_mri"]
