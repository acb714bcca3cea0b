"""Every connector keeps its checklist honest: each item is settled, and each test that it names exists."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ITEMS = {
    "config_validated",
    "timeouts",
    "retry_classification",
    "tls",
    "bad_input",
    "duplicates",
    "readiness_probe",
    "real_server_test",
    "docs",
}
ROOMS = ("dicomweb", "fhir", "mllp", "orthanc")


def checklist(room: str) -> dict[str, Any]:
    content = yaml.safe_load((ROOT / "connectors" / room / "checklist.yaml").read_text())
    assert isinstance(content, dict)
    return content


def defined_in(path: Path) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}


@pytest.mark.parametrize("room", ROOMS)
def test_checklist_is_whole_and_its_tests_exist(room: str) -> None:
    items = checklist(room)
    assert items.keys() == ITEMS
    for name, item in items.items():
        assert item["status"] in ("done", "exempt", "todo"), name
        assert item.get("test") if item["status"] == "done" else item.get("why"), name
        if "::" in str(item.get("test", "")):
            path, _, test = item["test"].partition("::")
            assert test in defined_in(ROOT / path), item["test"]
        elif "test" in item:
            assert (ROOT / item["test"]).is_file(), item["test"]
