"""Writes the tables of the guides that come from the code: `python -m docs.make_tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. tests/unit/test_docs.py fails where
the file differs from what this would write, so no setting can be missing, misspelt or out of date.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mappings.reading.series_to_roles import SERIES_ATTRIBUTES, STUDY_ATTRIBUTES
from middleware.settings import Settings

DOCS = Path(__file__).parent
SECTIONS = {
    "site": "Who we are on the wire, and the zone of times that state none.",
    "api": "Where `wetread serve` listens.",
    "retry": "How long a reading keeps trying a system that may come back.",
    "deliver": "How results go out, destination by destination.",
    "workers": "How the processes on one database know that another one has died.",
    "storage": "When the disk counts as full.",
    "retention": "What is removed by itself, and when. What is still needed stays, however old it is.",
    "pacs": "The PACS: a DICOMweb server, or a folder.",
    "ehr": "The EHR's FHIR R4 server.",
    "ehr_events": "What the EHR tells by FHIR Subscriptions: orders, imaging studies, merged patients.",
    "ris": "The RIS' HL7 listener (MLLP).",
    "pacs_watch": "Watches the PACS for studies that are new or have changed; not set: it is not watched.",
    "orthanc_changes": "Reads Orthanc's log of changes; not set: it is not read.",
    "completeness": "When a study that arrives is read, unless somebody says that it is complete.",
    "hl7_listener": "Our own HL7 v2 listener (MLLP): orders, patients and reports come in here.",
    "triton": "The inference server; not set: the bundled Triton is started.",
}
MEANINGS = {
    "concurrent_readings": "Studies that one process reads at the same time.",
    "site.sending_application": "MSH-3 of messages.",
    "site.sending_facility": "MSH-4 of messages.",
    "api.host": "Address to listen on. What only reads, and events, need no sign-in.",
    "api.port": "Port to listen on.",
    "retry.attempts": "Tries of a request before the reading ends as failed.",
    "retry.first_wait_s": "Wait after the first try; each further wait is twice as long.",
    "retry.longest_wait_s": "No wait grows beyond this, unless the peer asks for longer.",
    "ris.receiving_application": "MSH-5 of messages.",
    "ris.receiving_facility": "MSH-6 of messages.",
    "ris.processing_id": "MSH-11: P production, T training, D debugging.",
}
"""What the settings mean that have no description in the code."""


def list_settings() -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as a dotted path with its field, in the order of the code."""
    yield from _list_fields(Settings, "")


def _list_fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        nested = list(_find_models(field.annotation))
        if not nested:
            yield prefix + name, field
        for each in nested:
            yield from _list_fields(each, f"{prefix}{name}.")


def _find_models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is Annotated:
        yield from _find_models(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for each in get_args(annotation):
            yield from _find_models(each)


def settings_table() -> str:
    """One table for the top level and one for each system."""
    rows = list(list_settings())
    top = [row for row in rows if "." not in row[0]]
    parts = [_rows_to_table(top)]
    for section, meaning in SECTIONS.items():
        parts.append(f"**`{section}`**: {meaning}\n")
        parts.append(_rows_to_table([row for row in rows if row[0].startswith(f"{section}.")]))
    return "\n".join(parts)


def _rows_to_table(rows: list[tuple[str, FieldInfo]]) -> str:
    lines = [f"| `{path}` | {_show_default(field)} | {_meaning(path, field)} |" for path, field in rows]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *lines, ""])


def _show_default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None or field.default == "":
        return "not set"
    value = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return f"`{value}`"


def _meaning(path: str, field: FieldInfo) -> str:
    meaning = (field.description or MEANINGS[path]).replace("|", "\\|")
    secret = any(each is SecretStr for each in (field.annotation, *get_args(field.annotation)))
    return f"{meaning} Secret: give it as `{variable(path)}`." if secret else meaning


def variable(path: str) -> str:
    """The environment variable that sets a setting."""
    return "WETREAD_" + path.upper().replace(".", "__")


def attributes_table() -> str:
    """What conditions can look at."""
    study, series = (", ".join(f"`{name}`" for name in names) for names in (STUDY_ATTRIBUTES, SERIES_ATTRIBUTES))
    return f"| where | attributes |\n|---|---|\n| `match` | {study} |\n| `must`, `prefer` | {series} |\n"


TABLES = {"site-guide.md": {"settings": settings_table}, "protocols.md": {"attributes": attributes_table}}


def fill_tables(text: str, file: str) -> str:
    """`text` of the guide `file` with its tables written anew."""
    for name, make in TABLES[file].items():
        block = re.compile(rf"(<!-- table: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        table = make()
        text, count = block.subn(lambda found, table=table: f"{found[1]}\n{table}{found[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"{file} has {count} places for the table {name}, not one")
    return text


def main() -> None:
    """Write every table into its guide."""
    for file in TABLES:
        text = (DOCS / file).read_text(encoding="utf-8")
        (DOCS / file).write_text(fill_tables(text, file), encoding="utf-8")


if __name__ == "__main__":
    main()
