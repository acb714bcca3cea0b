"""The clinical context: what is chosen, what is refused with which reason, and that no data error raises."""

import copy
import random
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mappings.inputs.fhir_elements import parse_moment
from mappings.inputs.fhir_to_context import fhir_to_context, latest_psa
from mappings.model.codes import PSA, Code
from mappings.model.context import ClinicalContext, ContextValue

Json = dict[str, Any]


def patient(reference: str = "p1", value: str = "TEST-001", system: str = "urn:oid:1.2.3", **more: Any) -> Json:
    return {
        "resourceType": "Patient",
        "id": reference,
        "identifier": [{"system": system, "value": value}],
        "name": [{"use": "official", "family": "Phantom", "given": ["Peter", "Paul"]}],
        "birthDate": "1961-05-06",
        "gender": "male",
        **more,
    }


def identifier(value: str, type_code: str = "") -> Json:
    coding = {"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": type_code}
    return {"value": value, **({"type": {"coding": [coding]}} if type_code else {})}


def order(reference: str = "s1", type_code: str = "ACSN", **more: Any) -> Json:
    return {
        "resourceType": "ServiceRequest",
        "id": reference,
        "status": "active",
        "intent": "order",
        "subject": {"reference": "Patient/p1"},
        "identifier": [identifier("ACC-1", type_code), identifier("PL-1", "PLAC"), identifier("FI-1", "FILL")],
        "code": {"coding": [{"system": "http://example.org/exams", "code": "MRPRO", "display": "MR prostate"}]},
        "reasonCode": [{"text": "Elevated PSA"}],
        "requester": {"display": "Dr R Ferrer"},
        "priority": "routine",
        **more,
    }


def lab(reference: str = "o1", code: str = "2857-1", value: Any = 13.0, unit: str = "ng/mL", **more: Any) -> Json:
    return {
        "resourceType": "Observation",
        "id": reference,
        "status": "final",
        "subject": {"reference": "Patient/p1"},
        "code": {"coding": [{"system": "http://loinc.org", "code": code}]},
        "effectiveDateTime": "2026-02-01T08:00:00+01:00",
        "valueQuantity": {"value": value, "unit": unit, "system": "http://unitsofmeasure.org", "code": unit},
        **more,
    }


def read(*resources: Any, issuer: str = "1.2.3", accession: str = "ACC-1") -> ClinicalContext:
    return fhir_to_context(
        list(resources), source="ehr", patient_id="TEST-001", patient_issuer=issuer, accession_number=accession
    )


def reason(context: ClinicalContext, start: str) -> str:
    return next((line for line in context.missing if line.startswith(start)), "")


def test_patients_of_one_number_at_two_sites_are_told_apart_by_what_the_site_lists() -> None:
    issuers = (("SITEA", "urn:oid:1.2.3"), ("SITEB", "urn:oid:1.2.4"))
    numbers = [[{"system": f"urn:oid:1.2.{n}", "value": "TEST-001"}] for n in (3, 4)]
    both = [{**patient(), "id": f"p{n}", "identifier": number} for n, number in enumerate(numbers)]
    chosen = []
    for issuer in ("SITEA", "SITEB", "ELSEWHERE"):
        context = fhir_to_context(
            both, source="ehr", patient_id="TEST-001", patient_issuer=issuer, accession_number="A", issuers=issuers
        )
        chosen.append(context.patient.reference if context.patient else "")
    assert chosen == ["Patient/p0", "Patient/p1", ""]


def test_the_whole_context_with_its_sources() -> None:
    context = read(patient(), order(), lab())
    assert context.patient is not None
    assert (context.patient.reference, context.patient.name) == ("Patient/p1", "Phantom^Peter Paul")
    assert context.patient.birth_date == date(1961, 5, 6)
    assert context.order is not None
    assert (context.order.reference, context.order.reason) == ("ServiceRequest/s1", "Elevated PSA")
    assert (context.order.placer_order_number, context.order.filler_order_number) == ("PL-1", "FI-1")
    assert context.order.code == Code("MRPRO", "L", "MR prostate")
    assert context.order.code_system_url == "http://example.org/exams"
    assert context.labs == (ContextValue(PSA, 13.0, "ng/mL", datetime(2026, 2, 1, 7, tzinfo=UTC), "Observation/o1"),)
    assert context.missing == ()


def test_resources_entries_and_bundles_in_any_order_are_the_same() -> None:
    resources = [patient(), order(), lab(), lab("o2", value=4.0, effectiveDateTime="2025-01-01")]
    plain = read(*resources)
    bundle = {"resourceType": "Bundle", "entry": [{"resource": r} for r in resources]}
    assert read(bundle) == plain
    assert read(*bundle["entry"]) == plain
    mixed = [bundle, *resources]
    random.Random(1).shuffle(mixed)
    assert read(*mixed) == plain


def test_two_patients_of_one_id_are_none() -> None:
    context = read(patient(), patient("p2"), lab(), order())
    assert (context.patient, context.order, context.labs) == (None, None, ())
    assert "2 different patients" in reason(context, "patient:")
    assert "Patient/p1, Patient/p2" in reason(context, "patient:")


@pytest.mark.parametrize(
    ("system", "issuer", "chosen"),
    [
        ("urn:oid:1.2.3", "1.2.3", True),
        ("urn:oid:1.2.3", "urn:oid:1.2.3", True),
        ("urn:oid:1.2.3", "1.2.4", False),
        ("http://hospital.example/mrn", "1.2.3", False),
        ("urn:oid:1.2.3", "", True),
        ("", "1.2.3", True),
        ("urn:oid:1.2.3", "HOSPITAL", True),
    ],
)
def test_the_issuer_counts_where_it_can_be_compared(system: str, issuer: str, chosen: bool) -> None:
    assert (read(patient(system=system), issuer=issuer).patient is not None) == chosen


def test_the_issuer_tells_two_patients_apart() -> None:
    context = read(patient(), patient("p2", system="urn:oid:9.9"))
    assert context.patient is not None
    assert context.patient.reference == "Patient/p1"


def test_no_patient_a_merged_one_and_one_without_id_are_named() -> None:
    assert "none with the patient id" in reason(read(lab()), "patient:")
    merged = patient(link=[{"type": "replaced-by", "other": {"reference": "Patient/p9"}}])
    assert "merged" in reason(read(merged), "patient:")
    nameless = patient()
    del nameless["id"]
    assert read(nameless).patient is None
    assert "no id of its own" in reason(read(nameless), "patient:")


def test_an_order_by_accession_type_wins_over_a_bare_value() -> None:
    context = read(patient(), order("s1"), order("s2", type_code=""))
    assert context.order is not None
    assert context.order.reference == "ServiceRequest/s1"
    untyped = read(patient(), order("s2", type_code="")).order
    assert untyped is not None
    assert untyped.reference == "ServiceRequest/s2"


@pytest.mark.parametrize(
    ("orders", "accession", "words"),
    [
        ([order("s1"), order("s2", priority="stat")], "ACC-1", "2 different orders"),
        ([order("s1"), order("s1", priority="stat")], "ACC-1", "2 different orders"),
        ([order(status="entered-in-error")], "ACC-1", "'entered-in-error'"),
        ([order(status="revoked")], "ACC-1", "'revoked'"),
        ([order(subject={"reference": "Patient/p2"})], "ACC-1", "not this patient's"),
        ([order()], "ACC-2", "none with the accession number"),
        ([order()], "", "no accession number"),
    ],
)
def test_an_order_that_may_not_be_used_is_named(orders: list[Json], accession: str, words: str) -> None:
    context = read(patient(), *orders, accession=accession)
    assert context.order is None
    assert words in reason(context, "order:")


def test_copies_of_one_order_are_one() -> None:
    assert read(patient(), order(), copy.deepcopy(order())).order is not None


@pytest.mark.parametrize("code", ["2857-1", "35741-8", "83112-3"])
@pytest.mark.parametrize("unit", ["ng/mL", "ug/L"])
def test_total_psa_in_either_unit_is_ng_per_ml(code: str, unit: str) -> None:
    (value,) = read(patient(), lab(code=code, unit=unit)).labs
    assert (value.code.value, value.value, value.unit) == (code, 13.0, "ng/mL")


@pytest.mark.parametrize("code", ["10886-0", "12841-3", "19195-7", "19197-3"])
def test_other_psa_quantities_are_not_total_psa(code: str) -> None:
    context = read(patient(), lab(code=code))
    assert context.labs == ()
    assert "PSA: no usable value" in context.missing


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": "preliminary"}, "its status is preliminary"),
        ({"status": "cancelled"}, "its status is cancelled"),
        ({"status": "entered-in-error"}, "its status is entered-in-error"),
        ({"status": {"not": "hashable"}}, "its status is missing"),
        ({"valueQuantity": {"value": 0.1, "comparator": "<", "code": "ng/mL"}}, "comparator"),
        ({"valueQuantity": {"value": 13, "code": "nmol/L"}}, "its unit 'nmol/L'"),
        ({"valueQuantity": {"value": 13}}, "its unit None"),
        ({"valueQuantity": {"value": "13", "code": "ng/mL"}}, "no number"),
        ({"valueQuantity": {"value": True, "code": "ng/mL"}}, "no number"),
        ({"valueQuantity": {"value": float("nan"), "code": "ng/mL"}}, "no number"),
        ({"valueQuantity": {"value": -1, "code": "ng/mL"}}, "negative"),
        ({"valueQuantity": None, "valueString": "13 ng/mL"}, "no number"),
        ({"effectiveDateTime": None}, "its time is missing"),
        ({"effectiveDateTime": "2026-02"}, "not exact to a day"),
        ({"effectiveDateTime": "2026-02-01T08:00:00"}, "not exact to a day"),
        ({"effectiveDateTime": "2026-02-31"}, "not exact to a day"),
    ],
)
def test_a_psa_that_may_not_be_used_is_named(change: Json, words: str) -> None:
    context = read(patient(), lab(**change))
    assert context.labs == ()
    assert words in reason(context, "PSA: Observation/o1 not used")
    assert "PSA: no usable value" in context.missing


def test_units_in_words_serve_where_no_code_is_given() -> None:
    (value,) = read(patient(), lab(valueQuantity={"value": 13, "unit": "µg/L"})).labs
    assert value.value == 13.0
    local = {"value": 13, "unit": "ng/mL", "system": "http://local", "code": "17"}
    assert read(patient(), lab(valueQuantity=local)).labs[0].unit == "ng/mL"


def test_another_patients_value_is_refused_and_named() -> None:
    context = read(patient(), lab(subject={"reference": "Patient/p2"}), lab("o2", subject={}))
    assert context.labs == ()
    assert "Observation: Observation/o1 not used, it is not this patient's" in context.missing
    assert "Observation: Observation/o2 not used, it is not this patient's" in context.missing


@pytest.mark.parametrize(
    "subject",
    [
        {"reference": "Patient/p1"},
        {"reference": "https://ehr.example/fhir/Patient/p1"},
        {"reference": "Patient/p1/_history/3"},
        {"identifier": {"system": "urn:oid:1.2.3", "value": "TEST-001"}},
    ],
)
def test_each_form_of_reference_leads_to_the_patient(subject: Json) -> None:
    assert len(read(patient(), lab(subject=subject)).labs) == 1


def test_urn_references_inside_a_bundle() -> None:
    person = patient()
    del person["id"]
    entries = [
        {"fullUrl": "urn:uuid:1", "resource": person},
        {"fullUrl": "urn:uuid:2", "resource": lab(subject={"reference": "urn:uuid:1"})},
        {"fullUrl": "urn:uuid:3", "resource": lab("o3", subject={"reference": "urn:uuid:9"})},
    ]
    context = read({"resourceType": "Bundle", "entry": entries})
    assert context.patient is not None
    assert context.patient.reference == "urn:uuid:1"
    assert [v.reference for v in context.labs] == ["Observation/o1"]


def test_creatinine_and_egfr_keep_their_own_units() -> None:
    context = read(
        patient(),
        lab("c1", "2160-0", 0.9, "mg/dL"),
        lab("c2", "14682-9", 80, "umol/L"),
        lab("c3", "2160-0", 80, "umol/L"),
        lab("e1", "62238-1", 85, "mL/min/{1.73_m2}"),
    )
    assert [(v.reference, v.value, v.unit) for v in context.labs] == [
        ("Observation/c1", 0.9, "mg/dL"),
        ("Observation/c2", 80.0, "umol/L"),
        ("Observation/e1", 85.0, "mL/min/{1.73_m2}"),
    ]
    assert "its unit 'umol/L'" in reason(context, "creatinine: Observation/c3")


def test_notes_of_the_patient_without_refuted_and_own_ones() -> None:
    def note(kind: str, reference: str, text: str, **more: Any) -> Json:
        owner = "patient" if kind == "AllergyIntolerance" else "subject"
        own = {"resourceType": kind, "id": reference, owner: {"reference": "Patient/p1"}, "code": {"text": text}}
        return {**own, **more}

    refuted = {"coding": [{"code": "refuted"}]}
    context = read(
        patient(),
        note("Condition", "c1", "BPH", onsetDateTime="2024-01-01"),
        note("Condition", "c2", "Cancer", verificationStatus=refuted),
        note("Condition", "c3", "Other", subject={"reference": "Patient/p2"}),
        note("AllergyIntolerance", "a1", "Gadolinium"),
        note("DiagnosticReport", "d1", "MR Prostate", status="final", conclusion="PI-RADS 2"),
        note("DiagnosticReport", "d2", "Ours", identifier=[{"system": "urn:wetread:report", "value": "x"}]),
        note("ImagingStudy", "i1", "This study", identifier=[identifier("ACC-1")]),
    )
    assert [(n.kind, n.text, n.recorded_on) for n in context.notes] == [
        ("allergy", "Gadolinium", None),
        ("condition", "BPH", date(2024, 1, 1)),
        ("prior report", "MR Prostate: PI-RADS 2", None),
    ]
    assert "Condition: Condition/c3 not used, it is not this patient's" in context.missing


@pytest.mark.parametrize(
    ("written", "moment"),
    [
        ("2026-02-01", datetime(2026, 2, 1, tzinfo=UTC)),
        ("2026-02-01T23:30:00-05:00", datetime(2026, 2, 2, 4, 30, tzinfo=UTC)),
        ("2026-02-01T08:00:00.123Z", datetime(2026, 2, 1, 8, 0, 0, 123000, tzinfo=UTC)),
        ("2026-02-01T08:00:00", None),
        ("2026", None),
        ("0001-01-01T00:00:00+14:00", None),
        (17, None),
    ],
)
def test_times(written: object, moment: datetime | None) -> None:
    assert parse_moment(written) == moment


def test_period_end_and_issued_serve_as_time() -> None:
    period = lab(effectiveDateTime=None, effectivePeriod={"start": "2026-01-30", "end": "2026-01-31"})
    assert read(patient(), period).labs[0].effective_at.date() == date(2026, 1, 31)
    issued = lab(effectiveDateTime=None, issued="2026-01-29T10:00:00Z")
    assert read(patient(), issued).labs[0].effective_at.date() == date(2026, 1, 29)


def value_on(day: str, value: float = 13.0, reference: str = "Observation/1") -> ContextValue:
    return ContextValue(PSA, value, "ng/mL", datetime.fromisoformat(f"{day}T12:00:00+00:00"), reference)


@pytest.mark.parametrize(
    ("days", "chosen", "words"),
    [
        ((), None, "no usable PSA"),
        (("2026-01-01", "2026-02-01"), "2026-02-01", "31 days before"),
        (("2025-03-04",), "2025-03-04", "365 days before"),
        (("2025-03-03",), None, "366 days old, 365 are allowed"),
        (("2026-03-05",), "2026-03-05", "the day after"),
        (("2026-03-06",), None, "after the study"),
        (("2026-03-06", "2026-03-01"), "2026-03-01", "3 days before"),
    ],
)
def test_the_latest_psa_that_the_policy_allows(days: tuple[str, ...], chosen: str | None, words: str) -> None:
    context = ClinicalContext("ehr", labs=tuple(value_on(day) for day in days))
    value, why = latest_psa(context, date(2026, 3, 4), 365)
    assert (str(value.effective_at.date()) if value else None) == chosen
    assert words in why


def test_contradicting_psa_of_one_time_is_none() -> None:
    both = (value_on("2026-02-01", 13.0), value_on("2026-02-01", 3.0, "Observation/2"))
    value, why = latest_psa(ClinicalContext("ehr", labs=both), date(2026, 3, 4), 365)
    assert value is None
    assert "contradict" in why


def test_the_day_of_a_psa_is_the_one_that_its_source_wrote() -> None:
    late = datetime(2026, 3, 5, 23, tzinfo=timezone(timedelta(hours=-10)))
    context = ClinicalContext("ehr", labs=(ContextValue(PSA, 1.0, "ng/mL", late, "Observation/1"),))
    assert latest_psa(context, date(2026, 3, 4), 365)[0] is not None


def test_malformed_resources_are_named() -> None:
    context = read(patient(), None, 17, {"resourceType": 3}, {"resource": None}, [], "text")
    assert context.patient is not None
    assert "malformed" in reason(context, "resource:")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("2857-1"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_data_error_ever_raises(data: st.DataObject) -> None:
    resources = [copy.deepcopy(r) for r in (patient(), order(), lab())]
    resources.append({**lab("o2"), "resourceType": data.draw(st.sampled_from(["Condition", "ImagingStudy"]))})
    for resource in resources:
        key = data.draw(st.sampled_from(sorted(resource)))
        resource[key] = data.draw(JSON_VALUES)
        value = resource[key]
        inner = data.draw(st.sampled_from(sorted(resource)))
        if isinstance(resource[inner], dict) and resource[inner]:
            deeper = data.draw(st.sampled_from(sorted(resource[inner])))
            resource[inner] = {**resource[inner], deeper: value}
    context = read(*resources, data.draw(JSON_VALUES))
    latest_psa(context, date(2026, 3, 4), 365)
