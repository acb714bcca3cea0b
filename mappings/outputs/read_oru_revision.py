"""What an ORU must say of the one that it replaces: same sub-ids for the same observations, the rest deleted."""

from collections.abc import Callable, Mapping, Sequence

from mappings.model.findings import Findings
from mappings.outputs.read_facts import Facts, compare, withheld

ORU = "oru.hl7"
REVISION = "revision"
DELETED = "D"
TRACKING_UID = "112040"
Row = Sequence[str]
"""One OBX as its raw fields, field n at index n."""


def rows_of(message: bytes) -> list[Row]:
    """The OBX of a message; fields that are not there are empty."""
    lines = message.decode("utf-8").split("\r")
    return [(line.split("|") + [""] * 20)[:20] for line in lines if line.startswith("OBX|")]


def is_deleted(row: Row) -> bool:
    """Whether the OBX takes an observation back instead of giving one."""
    return row[11] == DELETED


def check_former(message: bytes, findings: Findings, former: bytes | None) -> list[str]:
    """Everything that the message leaves standing of `former`, moves to another sub-id, or deletes by mistake."""
    now, before = rows_of(message), rows_of(former) if former else []
    gone = {row[4]: row for row in before} if before else {}
    live = {row[4]: row for row in now if not is_deleted(row)}
    expected, found = Facts(), Facts()
    for sub_id, row in gone.items():
        if sub_id not in live:
            expected.add(REVISION, f"deleted {sub_id}", row[3])
    for row in now:
        if is_deleted(row):
            found.add(REVISION, f"deleted {row[4]}", row[3])
            expected.add(REVISION, f"value of deleted {row[4]}", '""')
            found.add(REVISION, f"value of deleted {row[4]}", row[5])
    for sub_id in live.keys() & gone.keys():
        expected.add(REVISION, f"observation {sub_id}", _identity(gone[sub_id]))
        found.add(REVISION, f"observation {sub_id}", _identity(live[sub_id]))
    _compare_groups(expected, found, live, gone)
    return compare(ORU, expected, found) + _check_told(findings, live, gone)


def _identity(row: Row) -> str:
    parts = row[3].split("^") + [""] * 4
    return f"{parts[0]} {parts[3]}".strip()


def _compare_groups(expected: Facts, found: Facts, live: Mapping[str, Row], gone: Mapping[str, Row]) -> None:
    """A finding that both have is under the same group, and no group passes to another finding."""
    for sub_id in live.keys() & gone.keys():
        if _identity(live[sub_id]) == TRACKING_UID and not is_deleted(gone[sub_id]):
            expected.add(REVISION, f"finding of {sub_id}", gone[sub_id][5])
            found.add(REVISION, f"finding of {sub_id}", live[sub_id][5])


def _check_told(findings: Findings, live: Mapping[str, Row], gone: Mapping[str, Row]) -> list[str]:
    """A finding that is no longer reported must be among what is deleted: without the former message nobody can."""
    if gone:
        return []
    return [
        f"{ORU}: {row.finding.tracking_id}: deleted observations: expected them, found nothing; "
        "the message of the former revision was not given"
        for row in findings.dropped
    ]


def read_interpreter(facts: Facts, where: str, field: str, unescape: Callable[[str], str]) -> None:
    """OBR-32: number, family, given and middle name of who signed."""
    parts = [unescape(part) for part in (field.split("~")[0].split("^")[0].split("&") + [""] * 6)[:4]]
    facts.add(where, "OBR-32", withheld("|".join(parts)))


def expect_interpreter(facts: Facts, where: str, findings: Findings) -> None:
    """The same from the findings."""
    signed = findings.signature
    group = next((g for g in signed.person.split("=") if g.strip("^ ")), "") if signed else ""
    family, given, middle = ([part.strip() for part in group.split("^")] + [""] * 3)[:3]
    parts = (signed.identifier, family, given, middle) if signed else ("",) * 4
    facts.add(where, "OBR-32", withheld("|".join(parts)))
