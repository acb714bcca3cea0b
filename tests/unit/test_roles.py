"""Which series plays which role: many scanners' ways of naming the same thing, each choice with its reasons."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from pydicom.dataset import Dataset

from mappings.inputs.dicom_to_study import datasets_to_study
from mappings.model.findings import RoleChoice
from mappings.model.protocol import Condition, GeometryPolicy, Protocol, Role
from mappings.model.study import Instance, PatientIdentity, Series, Study
from mappings.reading.series_to_roles import choose_series, failed, find_plane, label_series, match_protocol
from middleware.intake.protocols import load_protocols
from tests.dicom_sources import build_sources

PROTOCOL = load_protocols()["prostate_mri"].protocol
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


def series(
    number: int,
    description: str = "",
    *,
    count: int = 9,
    b_values: Sequence[float | None] = (None,),
    orientation: Any = AXIAL,
    spacing_mm: float = 0.5,
    **changes: Any,
) -> Series:
    instances = [
        Instance(f"1.{number}.{n}.{k}", "", "", "P1", orientation=orientation, position_mm=(0, 0, float(n)),
                 pixel_spacing_mm=(spacing_mm, spacing_mm), b_value_s_mm2=b)
        for k, b in enumerate(b_values) for n in range(count)
    ]  # fmt: skip
    plain = Series(f"1.{number}", "MR", tuple(instances), series_number=number, description=description)
    return replace(plain, **changes)


def t2(number: int = 4, **changes: Any) -> Series:
    plain = {
        "description": "t2_tse_tra",
        "scanning_sequence": ("SE",),
        "echo_time_ms": 104.0,
        "slice_thickness_mm": 3.0,
        "image_type": ("ORIGINAL", "PRIMARY", "M"),
    }
    return series(number, **{**plain, **changes})


def adc(number: int = 7, **changes: Any) -> Series:
    plain = {"description": "ep2d_ADC", "image_type": ("DERIVED", "PRIMARY", "ADC"), "scanning_sequence": ("EP",)}
    return series(number, **{"spacing_mm": 2.0, **plain, **changes})


def hbv(number: int = 8, **changes: Any) -> Series:
    plain = {
        "description": "ep2d_diff_BVAL",
        "image_type": ("DERIVED", "PRIMARY", "DIFFUSION", "TRACEW"),
        "scanning_sequence": ("EP",),
        "b_values": (1400.0,),
    }
    return series(number, **{"spacing_mm": 2.0, **plain, **changes})


def dce(number: int = 12, **changes: Any) -> Series:
    plain = {"description": "twist_tra_dyn", "scanning_sequence": ("GR",), "contrast_agent": "Gadoterate"}
    return series(number, **{"image_type": ("ORIGINAL", "PRIMARY", "M"), **plain, **changes})


def study(*members: Series, **changes: Any) -> Study:
    plain = Study("1.1", PatientIdentity("P1", sex="M"), members, description="MR Prostate")
    return replace(plain, **changes)


def choose(*members: Series, protocol: Protocol = PROTOCOL) -> dict[str, RoleChoice]:
    return {c.role: c for c in choose_series(study(*members), protocol)}


def chosen(*members: Series, protocol: Protocol = PROTOCOL) -> dict[str, str | None]:
    found = choose(*members, protocol=protocol)
    return {role: (c.series_instance_uid or "").removeprefix("1.") or None for role, c in found.items()}


def with_role(name: str, **changes: Any) -> Protocol:
    roles = tuple(replace(r, **changes) if r.name == name else r for r in PROTOCOL.roles)
    return replace(PROTOCOL, roles=roles)


PLAIN = {"t2w": "4", "adc": "7", "hbv": "8", "dce": None}


def test_plain_study() -> None:
    assert chosen(t2(), adc(), hbv()) == PLAIN
    assert chosen(hbv(), adc(), t2(), dce()) == {**PLAIN, "dce": "12"}


@pytest.mark.parametrize(
    ("member", "role"),
    [
        (t2(image_type=()), "4"),
        (t2(image_type=(), description="AX T2 FRFSE", scanning_sequence=("RM",)), "4"),
        (t2(description="", scanning_sequence=("SE",)), "4"),
        (t2(description="T2W_TSE_ax", protocol_name="WIP", scanning_sequence=("SE", "SK")), "4"),
        (t2(echo_time_ms=None), "4"),
        (t2(orientation=(0.98, 0.0, -0.199, 0.06, 0.953, 0.296)), "4"),
        (t2(scanning_sequence=(), description="t2 blade axial"), "4"),
        (t2(orientation=CORONAL), None),
        (t2(orientation=SAGITTAL), None),
        (t2(orientation=None), None),
        (t2(orientation=(0.0,) * 6), None),
        (t2(description="t1_tse_tra"), None),
        (t2(description="AX_T1_fs"), None),
        (t2(description="t2_haste_loc"), None),
        (t2(echo_time_ms=11.0), None),
        (t2(image_type=("ORIGINAL", "PRIMARY", "LOCALIZER")), None),
        (t2(image_type=("DERIVED", "SECONDARY", "mpr")), None),
        (t2(scanning_sequence=("GR",)), None),
        (t2(scanning_sequence=("EP", "SE")), None),
        (t2(scanning_sequence=(), description="axial"), None),
        (t2(modality="CT"), None),
        (t2(count=4), None),
    ],
)
def test_t2_axial(member: Series, role: str | None) -> None:
    assert chosen(member)["t2w"] == role


@pytest.mark.parametrize(
    ("member", "role"),
    [
        (adc(image_type=()), "7"),
        (adc(description="dADC", image_type=("DERIVED", "SECONDARY")), None),
        (adc(description="Apparent Diffusion Coefficient (mm2/s)", image_type=()), "7"),
        (adc(description="ADC (10^-6 mm2/s)", image_type=("DERIVED", "SECONDARY")), "7"),
        (adc(description="DYNDIST_ADC", image_type=("DERIVED",)), "7"),
        (adc(description="map", image_type=("DERIVED", "PRIMARY", "DIFFUSION", "adc")), "7"),
        (adc(description="eADC", image_type=("DERIVED", "PRIMARY")), None),
        (adc(description="exponential ADC"), None),
        (adc(description="diff_trace", image_type=("DERIVED", "TRACEW")), None),
        (adc(orientation=CORONAL), None),
        (adc(description="cadcam", image_type=()), None),
    ],
)
def test_adc_map(member: Series, role: str | None) -> None:
    assert chosen(member)["adc"] == role


@pytest.mark.parametrize(
    ("member", "role"),
    [
        (hbv(image_type=()), "8"),
        (hbv(image_type=(), scanning_sequence=(), description="DWI"), "8"),
        (hbv(b_values=(None,), description="ep2d_DYNDISTCALC_BVAL"), "8"),
        (hbv(b_values=(None,), description="DWI b1400"), "8"),
        (hbv(b_values=(None,), description="DWI b=800"), "8"),
        (hbv(b_values=(None,), description="DWI b50"), None),
        (hbv(b_values=(None,), description="DWI"), None),
        (hbv(b_values=(400.0,), description="ep2d_CALC_BVAL"), None),
        (hbv(b_values=(50.0,), description="DWI b1400"), None),
        (hbv(b_values=(799.0,)), None),
        (hbv(b_values=(800.0,)), "8"),
        (hbv(description="ep2d_diff_ADC"), None),
        (hbv(image_type=("DERIVED", "PRIMARY", "FA")), None),
        (hbv(image_type=(), scanning_sequence=("GR",), description="x"), None),
    ],
)
def test_high_b_value(member: Series, role: str | None) -> None:
    assert chosen(member)["hbv"] == role


@pytest.mark.parametrize(
    ("member", "role"),
    [
        (dce(), "12"),
        (dce(image_type=()), "12"),
        (dce(contrast_agent=""), None),
        (dce(contrast_agent=" "), None),
        (dce(image_type=("DERIVED", "PRIMARY", "SUBTRACTION")), None),
        (dce(scanning_sequence=("SE",)), None),
        (dce(orientation=CORONAL), None),
    ],
)
def test_contrast_series_is_optional(member: Series, role: str | None) -> None:
    found = choose(member)["dce"]
    assert (found.series_instance_uid or "").removeprefix("1.") == (role or "")
    assert not found.required


def test_most_images_of_contrast_win() -> None:
    assert chosen(dce(12, count=20), dce(13, count=60), dce(14, count=20))["dce"] == "13"


# Several b-values


def test_several_b_values_only_is_refused_naming_them() -> None:
    found = choose(t2(), adc(), hbv(b_values=(50.0, 400.0, 800.0)))["hbv"]
    assert found.series_instance_uid is None
    assert "series 8 ep2d_diff_BVAL refused: several b-values in one series (50, 400, 800 s/mm2)" in found.reasons


def test_several_b_values_are_taken_where_the_protocol_says_highest() -> None:
    mixed = hbv(b_values=(50.0, 400.0, 800.0))
    highest = with_role("hbv", geometry=GeometryPolicy(several_b_values="highest"))
    assert chosen(mixed, protocol=highest)["hbv"] == "8"
    assert chosen(mixed, hbv(9), protocol=highest)["hbv"] == "9", "the higher b-value wins"
    assert chosen(hbv(b_values=(50.0, 400.0)), protocol=highest)["hbv"] is None


# Preferences


def test_the_latest_of_repeated_series_is_preferred() -> None:
    found = choose(t2(4), t2(14), t2(9), adc(7), adc(17), hbv(8), hbv(18))
    assert {r: c.series_label.split()[0] for r, c in found.items() if c.series_label} == {
        "t2w": "14",
        "adc": "17",
        "hbv": "18",
    }
    assert "series 4 t2_tse_tra not preferred: higher series_number (14) elsewhere" in found["t2w"].reasons
    assert "series 8 ep2d_diff_BVAL not preferred: higher series_number (18) elsewhere" in found["hbv"].reasons


def test_the_finer_of_two_t2_axials_is_preferred_though_an_other_is_later() -> None:
    body = t2(20, description="t2_tse_tra_pelvis", spacing_mm=0.9, slice_thickness_mm=5.0)
    found = choose(t2(), body)["t2w"]
    assert found.series_label == "4 t2_tse_tra"
    assert "series 20 t2_tse_tra_pelvis not preferred: lower pixel_spacing_mm (0.5) elsewhere" in found.reasons


def test_3d_t2_is_taken_alone_and_by_resolution() -> None:
    space = t2(6, description="t2_space_tra", acquisition_type="3D", slice_thickness_mm=0.8, spacing_mm=0.8, count=60)
    assert chosen(space)["t2w"] == "6"
    assert chosen(space, t2())["t2w"] == "4"
    assert chosen(space, t2(spacing_mm=0.8))["t2w"] == "6", "thinner slices where pixels are alike"


def test_higher_b_value_is_preferred_to_a_later_series() -> None:
    assert chosen(hbv(8, b_values=(1400.0,)), hbv(9, b_values=(800.0,)))["hbv"] == "8"


def test_candidates_that_state_a_preferred_value_win_over_those_that_do_not() -> None:
    assert chosen(hbv(9, b_values=(None,), description="calc_bval"), hbv(8))["hbv"] == "8"


def test_order_of_series_in_the_study_decides_nothing() -> None:
    members = [t2(), t2(20, spacing_mm=0.9), adc(), adc(17), hbv(), dce(), series(2, "loc")]
    assert chosen(*members) == chosen(*members[::-1]) == {"t2w": "4", "adc": "17", "hbv": "8", "dce": "12"}


def test_a_series_plays_one_role() -> None:
    both = hbv(7, description="b1400")
    roles = (PROTOCOL.role("hbv"), replace(PROTOCOL.role("hbv"), name="again", title="Again"))
    found = choose(both, protocol=replace(PROTOCOL, roles=roles))
    assert found["again"].series_instance_uid is None
    assert "already used as hbv" in found["again"].reasons[0]


# Our own results, and reasons


@pytest.mark.parametrize("modality", ["SEG", "SR", "OT", "SC", "PR", "KO"])
def test_results_in_the_study_are_never_candidates(modality: str) -> None:
    own = [
        t2(900, modality=modality, spacing_mm=0.1),
        adc(901, modality=modality),
        hbv(902, modality=modality, b_values=(3000.0,)),
    ]
    found = choose(*own, t2(), adc(), hbv())
    assert [c.series_label.split()[0] for c in found.values() if c.series_label] == ["4", "7", "8"]
    assert f"series 900 t2_tse_tra refused: modality is {modality}" in found["t2w"].reasons


def test_every_series_has_one_reason_in_every_role() -> None:
    members = [t2(), t2(5, orientation=SAGITTAL), adc(), hbv(b_values=(50.0, 800.0)), hbv(9), dce(), t2(20)]
    for role in choose(*members).values():
        assert len(role.reasons) == len(members)
        assert all(sum(f"series {label_series(s)} " in r for r in role.reasons) >= 1 for s in members)


def test_reasons_say_what_was_looked_at() -> None:
    found = choose(t2(), t2(3, orientation=SAGITTAL, description="t2_tse_sag"), adc(), hbv())
    assert found["t2w"].reasons[0].startswith("series 4 t2_tse_tra chosen: modality MR, plane axial")
    assert "series 3 t2_tse_sag refused: plane is sagittal, not axial" in found["t2w"].reasons
    assert "b_value 1400" in found["hbv"].reasons[0]
    assert found["hbv"].reasons[0].count("b_value") == 1


def test_empty_study_leaves_every_role_open() -> None:
    assert chosen() == dict.fromkeys(PLAIN)


# Headers of other vendors, read from datasets


def as_study(make: Callable[[Dataset], None], **changes: Any) -> Study:
    datasets = build_sources((6, 4, 4), **changes)
    for ds in datasets:
        make(ds)
    return datasets_to_study((f"f{n}", ds) for n, ds in enumerate(datasets))


def test_ge_high_b_value_in_its_private_element_with_the_offset() -> None:
    def make(ds: Dataset) -> None:
        ds.private_block(0x43, "GEMS_PARM_01", create=True).add_new(0x39, "IS", [1000001400, 8, 0, 0])

    found = as_study(make, Manufacturer="GE MEDICAL SYSTEMS", ImageType=["ORIGINAL", "PRIMARY", "OTHER"],
                     ScanningSequence=["EP", "SE"], SeriesDescription="Ax DWI")  # fmt: skip
    choice = next(c for c in choose_series(found, PROTOCOL) if c.role == "hbv")
    assert choice.series_instance_uid is not None
    assert "b_value 1400" in choice.reasons[0]


def test_philips_high_b_value_in_its_private_element() -> None:
    def make(ds: Dataset) -> None:
        ds.private_block(0x2001, "Philips Imaging DD 001", create=True).add_new(0x03, "FL", 1500.0)

    found = as_study(make, ImageType=["ORIGINAL", "PRIMARY", "DIFFUSION", "NONE"], SeriesDescription="dDWI",
                     ScanningSequence="SE")  # fmt: skip
    choice = next(c for c in choose_series(found, PROTOCOL) if c.role == "hbv")
    assert "b_value 1500" in choice.reasons[0]


# Conditions, and which studies match


def values(*stated: str | float) -> Callable[[str], tuple[str | float, ...]]:
    return lambda _name: stated


NEITHER = "x is b, not A; y is b, not like z"


@pytest.mark.parametrize(
    ("condition", "stated", "reason"),
    [
        (Condition("x", any_of=("A",)), ("a", "b"), None),
        (Condition("x", any_of=("A", "B")), ("c",), "x is c, not A or B"),
        (Condition("x", any_of=("A",)), (), "x is not stated"),
        (Condition("x", any_of=("A",), missing="pass"), (), None),
        (Condition("x", none_of=("a",)), ("b", "A"), "x is b, A, which may not be a"),
        (Condition("x", at_least=5), (4.5,), "x is 4.5, under 5"),
        (Condition("x", at_least=5), ("9",), "x is 9, under 5"),
        (Condition("x", at_most=5), (5,), None),
        (Condition("x", at_most=5, at_least=4), (6,), "x is 6, under 4, over 5"),
        (Condition("x", matches="^a"), ("ba", "ab"), None),
        (Condition("x", matches="^a"), ("b",), "x is b, not like ^a"),
        (Condition("x", not_matches="b"), ("a", "abc"), "x is a, abc, which may not be like b"),
        (Condition("x", any_of=("A",), say="it is {value}!"), ("{b}",), "it is {b}!"),
        (Condition(any=(Condition("x", any_of=("A",)), Condition("x", any_of=("B",)))), ("b",), None),
        (Condition(any=(Condition("x", any_of=("A",)),), say="no"), ("b",), "no"),
        (Condition(any=(Condition("x", any_of=("A",)), Condition("y", matches="z"))), ("b",), NEITHER),
    ],
)  # fmt: skip
def test_conditions(condition: Condition, stated: tuple[Any, ...], reason: str | None) -> None:
    found = failed(condition, values(*stated))
    assert (found is None) == (reason is None)
    if reason and condition.at_most is None:
        assert found == reason


def test_which_studies_the_protocol_reads() -> None:
    def why(**changes: Any) -> tuple[str, ...]:
        return match_protocol(study(t2(), **changes), PROTOCOL)

    assert why() == ()
    assert why(description="", series=(t2(body_part="PROSTATE"),)) == ()
    assert why(description="", series=(t2(description="t2 Prostata"),)) == ()
    assert why(patient=PatientIdentity("P1")) == ()
    assert why(patient=PatientIdentity("P1", sex="F")) == ("the patient's sex is stated as F",)
    assert why(description="MR knee") == ("neither body part nor any description names the prostate",)
    assert why(series=(t2(modality="CT"),)) == ("the study holds no MR images (CT)",)


def test_plane_and_label() -> None:
    planes = [find_plane(t2(orientation=o)) for o in (AXIAL, CORONAL, SAGITTAL, None)]
    assert planes == ["axial", "coronal", "sagittal", ""]
    labels = [label_series(s) for s in (series(0, "loc"), series(4), replace(series(4), series_number=None))]
    assert labels == ["0 loc", "4", "(unnamed)"]


def test_role_without_preferences_takes_the_first_and_says_so() -> None:
    role = Role("r", "R", (Condition("modality", any_of=("MR",)),))
    found = choose(t2(4), t2(5), protocol=replace(PROTOCOL, roles=(role,)))["r"]
    assert found.reasons[1] == "series 5 t2_tse_tra not preferred: another candidate comes first"
