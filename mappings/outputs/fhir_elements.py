"""FHIR R4 datatypes from the model's nouns, as the dicts that JSON wants."""

from typing import Any
from urllib.parse import quote

from mappings.model.codes import Code
from mappings.model.measurement import Measurement

Json = dict[str, Any]

NO_DISPLAY = frozenset({"LN", "SCT"})
"""Schemes whose owners fix the display of a code: DICOM's meaning differs from theirs, so it goes into `text`."""

DCM_OID = "urn:oid:1.2.840.10008.2.16.4"
DCM_IN_R4 = frozenset({"110180", "111013", "112039", "112040", "113041", "121071", "121207", "126030"})
"""DCM codes that servers' copies of the R4 code system hold (HAPI 8.8's is of about 2014). Any other DCM code is
sent under the scheme's OID, which names the same codes: under the URL such a server calls it an error."""

DICOM_UID = "urn:dicom:uid"
REPORT = "urn:wetread:report"
RESULT = "urn:wetread:result"
MODEL = "urn:wetread:model"
PROVENANCE = "urn:wetread:provenance"
IDENTIFIER_TYPES = "http://terminology.hl7.org/CodeSystem/v2-0203"


def without_empty(element: Json) -> Json:
    """`element` less the keys whose value is None, empty text, an empty list or an empty object."""
    return {key: value for key, value in element.items() if value not in (None, "", [], {})}


def to_coding(code: Code, system: str | None = None) -> Json:
    """A Coding; `system` overrides the scheme's URL ("" for none)."""
    display = "" if code.scheme in NO_DISPLAY else code.meaning
    if system is None:
        newer = code.scheme == "DCM" and code.value not in DCM_IN_R4
        system = DCM_OID if newer else code.system
    return without_empty({"system": system, "code": code.value, "display": display})


def to_concept(*codes: Code, text: str = "") -> Json:
    """A CodeableConcept; its text is the first code's meaning unless given."""
    return {"coding": [to_coding(code) for code in codes], "text": text or codes[0].meaning}


def to_key(key: str, label: str) -> Code:
    """The code that tells two values of one concept apart (mean and 10th percentile ADC)."""
    return Code(key.replace(" ", "_"), "99WETREAD", label)


def to_quantity(measurement: Measurement) -> Json:
    """A Quantity with the digits that every rendering shows, in UCUM."""
    unit = measurement.unit
    return {
        "value": float(measurement.text),
        "unit": unit.value,
        "system": unit.system,
        "code": unit.value,
    }


def to_identifier(system: str, value: str, type_code: str = "") -> Json:
    """An Identifier, typed by v2-0203 where a type is given."""
    coding = [{"system": IDENTIFIER_TYPES, "code": type_code}]
    return without_empty({"type": {"coding": coding} if type_code else None, "system": system, "value": value})


def uid_identifier(uid: str) -> Json:
    """The Identifier of a DICOM UID (FHIR R4 ImagingStudy.identifier)."""
    return to_identifier(DICOM_UID, f"urn:oid:{uid}")


def to_query(identifier: Json, parameter: str = "identifier") -> str:
    """The search that finds a resource by `identifier`, escaped for a URL."""
    value = identifier["value"]
    for character in "\\$,|":
        value = value.replace(character, f"\\{character}")
    return f"{parameter}={quote(identifier['system'], safe=':')}%7C{quote(value, safe=':')}"
