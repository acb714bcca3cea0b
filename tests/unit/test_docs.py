"""The guides against the code: settings, protocol keys, attributes, commands, links, states, and the files to copy."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml

from docs.make_tables import TABLES, fill_tables, list_settings, variable
from mappings.model import codes
from mappings.model.protocol import (
    Condition,
    GeometryPolicy,
    Measure,
    Model,
    Outputs,
    Protocol,
    PsaPolicy,
    Role,
    Tensor,
)
from mappings.reading.routing import compile_rule
from mappings.reading.series_to_roles import SERIES_ATTRIBUTES, STUDY_ATTRIBUTES
from mappings.reading.study_to_facts import FACTS
from middleware.api import deliveries, events, health, keys
from middleware.api.deliveries import changing_router
from middleware.cli import cli
from middleware.errors import EndState
from middleware.intake.protocols import MODEL_OUTPUTS
from middleware.process import EXIT_CODES, RESULT_FILES
from middleware.settings import load_settings

ROOT = Path(__file__).parents[2]
GUIDES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
READING_STATES = {"waiting", "accepted", "reading", "released", "rejected", *get_args(EndState)}
DELIVERY_STATES = {"pending", "in_flight", "delivered", "retrying", "ambiguous", "dead"}


def read(guide: Path) -> str:
    return guide.read_text(encoding="utf-8")


def code_in(text: str) -> list[str]:
    """Every inline code span and every line of a fenced block."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [*spans, *(line.strip() for block in blocks for line in block.splitlines())]


def first_cells(text: str, heading: str) -> set[str]:
    """The code words in the first column of the table whose header starts with `heading`."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} "))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(line.split("|")[1])
    return {word for row in rows for word in re.findall(r"`([^`]+)`", row)}


def command_paths() -> set[str]:
    group: Any = typer.main.get_command(cli)
    paths = set()
    for name, command in group.commands.items():
        subcommands = getattr(command, "commands", {})
        paths |= {f"{name} {sub}" for sub in subcommands}
        paths |= {name} if not subcommands or command.invoke_without_command else set()
    return paths


def path_of(words: list[str]) -> str:
    """The command that these words name: two of them where there is such a subcommand."""
    two = " ".join(words[:2])
    return two if words[0] == "protocols" or two in command_paths() else words[0]


def options_of(path: str) -> set[str]:
    command: Any = typer.main.get_command(cli)
    for part in path.split():
        command = command.commands[part]
    return {option for parameter in command.params for option in parameter.opts}


def commands_in(text: str) -> list[list[str]]:
    found = (line.split("#")[0].split() for line in code_in(text))
    return [words[1:] for words in found if len(words) > 1 and words[0] in ("wetread", ".venv/bin/wetread")]


@pytest.mark.parametrize("file", TABLES)
def test_tables_from_the_code_are_up_to_date(file: str) -> None:
    text = read(ROOT / "docs" / file)
    assert fill_tables(text, file) == text, "run: python -m docs.make_tables"


def test_the_settings_table_holds_each_setting_once() -> None:
    rows = re.findall(
        r"^\| `([a-z0-9_.]+)` \| (?:required|not set|`)", read(ROOT / "docs" / "site-guide.md"), re.MULTILINE
    )
    assert rows == [path for path, _ in list_settings()]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: g.name)
def test_every_setting_that_a_guide_names_exists(guide: Path) -> None:
    known = {path for path, _ in list_settings()}
    sections = {path.partition(".")[0] for path in known if "." in path}
    named = re.findall(rf"(?<![\w./])((?:{'|'.join(sections)})\.[a-z_]+)(?![\w/])", " ".join(code_in(read(guide))))
    endings = ("csv", "md", "py", "dcm", "example")
    wrong = [
        n for n in named if n not in known and not n.endswith(endings) and not any(k.startswith(n + ".") for k in known)
    ]
    assert not wrong


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: g.name)
def test_every_variable_that_a_guide_names_exists(guide: Path) -> None:
    known = {variable(path) for path, _ in list_settings()} | {"WETREAD_CONFIG", "WETREAD_SECRETS_DIR"}
    assert set(re.findall(r"\bWETREAD_[A-Z0-9_]+[A-Z0-9]\b", read(guide))) <= known


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: g.name)
def test_every_command_and_option_that_a_guide_names_exists(guide: Path) -> None:
    for words in commands_in(read(guide)):
        path = path_of(words)
        assert path in command_paths(), f"wetread {' '.join(words)}"
        options = {word for word in words if word.startswith("--")}
        assert options <= options_of(path), f"wetread {' '.join(words)}"


def test_the_site_guide_or_protocols_guide_names_every_command() -> None:
    text = " ".join(read(guide) for guide in GUIDES)
    named = {path_of(words) for words in commands_in(text)}
    made = {"demo"} if "make demo" in text else set()
    assert command_paths() == named | made


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: g.name)
def test_every_make_target_that_a_guide_names_exists(guide: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", read(ROOT / "Makefile"), re.MULTILINE))
    lines = [line.split() for line in code_in(read(guide)) if line.startswith("make ")]
    named = {word for words in lines for word in words[1:] if re.fullmatch(r"[a-z]+", word)}
    assert all(words[1] in targets for words in lines), named - targets


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: g.name)
def test_every_relative_link_leads_somewhere(guide: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(guide)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (guide.parent / file).resolve() if file else guide
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", read(linked), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: g.name)
def test_every_path_of_the_repository_that_a_guide_names_exists(guide: Path) -> None:
    roots = "middleware|connectors|mappings|templates|deploy|docs|tests"
    for span in code_in(read(guide)):
        if re.fullmatch(rf"(?:{roots})/[\w./-]+", span):
            assert (ROOT / span).exists(), span


def test_every_state_is_explained() -> None:
    text = read(ROOT / "docs" / "site-guide.md")
    assert first_cells(text, "state of a reading") == READING_STATES
    assert first_cells(text, "state of a delivery") == DELIVERY_STATES
    tables = (ROOT / "middleware" / "store" / "tables.py").read_text()
    assert all(state in tables for state in READING_STATES | DELIVERY_STATES)


def test_every_exit_code_is_explained() -> None:
    table = read(ROOT / "docs" / "site-guide.md").split("## Exit codes")[1]
    explained = {int(code) for code in re.findall(r"^\| (\d) \|", table, re.MULTILINE)}
    assert explained == {*EXIT_CODES.values(), 2}


def test_every_route_that_the_site_guide_names_exists_and_the_other_way_round() -> None:
    text = read(ROOT / "docs" / "site-guide.md")
    modules = (events, health, keys, deliveries)
    for route in (*(r for module in modules for r in module.router.routes), *changing_router.routes):
        path = re.sub(r"\{study_uid\}", "{uid}", getattr(route, "path", ""))
        assert path in text, path


def test_every_protocol_key_is_explained_and_the_other_way_round() -> None:
    text = read(ROOT / "docs" / "protocols.md")
    psa = {f"psa.{f.name}" for f in fields(PsaPolicy)}
    assert first_cells(text, "key") == {f.name for f in fields(Protocol)}
    assert first_cells(text, "`geometry` key") == {f.name for f in fields(GeometryPolicy)}
    assert first_cells(text, "`model` key") == {f.name for f in fields(Model)}
    assert first_cells(text, "`measure` key") == ({f.name for f in fields(Measure)} - {"psa"}) | psa
    assert first_cells(text, "`outputs` key") == {f.name for f in fields(Outputs)}
    assert all(f"`{f.name}`" in text for f in (*fields(Role), *fields(Tensor), *fields(Condition)))


def test_the_example_condition_of_the_guide_is_one() -> None:
    block = re.findall(r"```yaml\n(.*?)```", read(ROOT / "docs" / "protocols.md"), re.DOTALL)[0]
    (condition,) = yaml.safe_load(block)
    assert condition["attribute"] in SERIES_ATTRIBUTES
    assert set(condition) <= {f.name for f in fields(Condition)}


def test_the_attributes_table_holds_all_attributes() -> None:
    text = read(ROOT / "docs" / "protocols.md")
    for attribute in (*STUDY_ATTRIBUTES, *SERIES_ATTRIBUTES):
        assert f"`{attribute}`" in text


def test_the_guide_lists_the_facts_that_rules_may_use_and_its_example_rules_load() -> None:
    text = read(ROOT / "docs" / "protocols.md")
    assert first_cells(text, "fact") == set(FACTS)
    example = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    for rule in (*example["when"], *example["set_aside"]):
        compile_rule(rule["expression"])


def test_the_model_contract_agrees_with_the_protocol_and_the_reference_model() -> None:
    text = read(ROOT / "docs" / "model-contract.md")
    model = yaml.safe_load(read(ROOT / "mappings" / "protocols" / "prostate_mri.yaml"))["model"]
    table = re.findall(r"^\| (in|out) `(\w+)` \| (\w+) \| `\[([^\]]+)\]`", text, re.MULTILINE)
    assert [(n, t) for d, n, t, _ in table if d == "in"] == [(i["name"], i["datatype"]) for i in model["inputs"]]
    assert [(n, t) for d, n, t, _ in table if d == "out"] == [(o["name"], o["datatype"]) for o in model["outputs"]]
    assert [n for d, n, _, _ in table if d == "out"] == list(MODEL_OUTPUTS)
    example = re.findall(r"```protobuf\n(.*?)```", text, re.DOTALL)[0]
    reference = read(ROOT / "deploy" / "triton" / "models" / "prostate_reference" / "config.pbtxt")
    tensor = r'\{ name: "\w+" data_type: \w+ dims: \[[^\]]+\] \}'
    assert re.findall(tensor, example) == re.findall(tensor, reference)


def test_the_results_guide_names_every_file() -> None:
    assert first_cells(read(ROOT / "docs" / "results.md"), "file") == {*RESULT_FILES, "key-images/*.png"}


def test_the_results_guide_names_codes_that_the_findings_use() -> None:
    known = {(c.scheme, c.value) for c in vars(codes).values() if isinstance(c, codes.Code)}
    schemes = {"LOINC": "LN"}
    named = re.findall(r"\b(SCT|DCM|LOINC|IBSI) ([A-Z0-9-]*\d[A-Z0-9-]*|L0JK)", read(ROOT / "docs" / "results.md"))
    assert len(named) > 12
    assert {(schemes.get(scheme, scheme), value) for scheme, value in named} <= known


def test_the_example_settings_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WETREAD_CONFIG", raising=False)
    settings = load_settings(ROOT / "deploy" / "example" / "wetread.yaml")
    assert settings.pacs is not None
    assert settings.ehr is not None
    assert settings.ris is not None
    assert settings.triton is not None


def test_the_compose_file_sets_only_what_exists_and_holds_no_secret() -> None:
    compose = yaml.safe_load(read(ROOT / "deploy" / "compose.yaml"))
    known = {variable(path) for path, _ in list_settings()}
    assert set(compose["services"]["wetread"]["environment"]) <= known
    assert set(compose["services"]["worker"]["environment"]) <= known
    assert "${POSTGRES_PASSWORD" in compose["services"]["wetread"]["environment"]["WETREAD_DATABASE_URL"]
    for service in compose["services"].values():
        assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", service["image"]), "images are named by a version's tag"
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            named = source in compose["volumes"] or source == "../wetread.yaml"
            assert named or (ROOT / "deploy" / source).exists(), volume


def kubernetes_objects() -> list[dict[str, Any]]:
    folder = ROOT / "deploy" / "kubernetes"
    files = yaml.safe_load(read(folder / "kustomization.yaml"))["resources"]
    return [one for file in files for one in yaml.safe_load_all(read(folder / file))]


def test_the_kubernetes_manifests_set_only_what_exists_and_hold_no_secret() -> None:
    known = {variable(path) for path, _ in list_settings()} | {"WETREAD_SECRETS_DIR"}
    pods = [one["spec"]["template"]["spec"] for one in kubernetes_objects() if "template" in one["spec"]]
    assert len(pods) == 3
    for container in (container for pod in pods for container in pod["containers"]):
        assert {variable["name"] for variable in container.get("env", [])} <= known
        assert not any("PASSWORD" in each["name"] or "TOKEN" in each["name"] for each in container.get("env", []))
        assert {"startupProbe", "readinessProbe"} <= set(container)
        assert {"requests", "limits"} <= set(container["resources"])
    mounted = {volume["secret"]["secretName"] for pod in pods for volume in pod["volumes"] if "secret" in volume}
    assert mounted == {"wetread-secrets"}


def test_the_kubernetes_settings_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WETREAD_CONFIG", raising=False)
    settings = load_settings(ROOT / "deploy" / "kubernetes" / "wetread.yaml")
    assert settings.artifacts_url
    assert settings.hl7_listener is not None


def test_kubernetes_selectors_find_their_pods() -> None:
    objects = kubernetes_objects()
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in objects if "template" in one["spec"]]
    selectors = [one["spec"]["selector"] for one in objects if "selector" in one["spec"]]
    plain = [selector.get("matchLabels", selector) for selector in selectors]
    assert len(plain) >= 7
    assert all(selector in labels for selector in plain)


def test_the_image_copies_what_exists_and_all_that_the_service_imports() -> None:
    text = read(ROOT / "deploy" / "Dockerfile")
    sources = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert all((ROOT / source).exists() for source in sources)
    assert {"middleware", "connectors", "mappings", "templates", "deploy/triton"} <= set(sources)
    names = {word.partition("=")[0] for word in re.findall(r"WETREAD_\w+=", text)}
    assert {name.rstrip("=") for name in names} <= {variable(path) for path, _ in list_settings()} | {
        "WETREAD_CONFIG",
        "WETREAD_SECRETS_DIR",
    }


def test_the_pictures_are_small() -> None:
    files = [f for f in (ROOT / "docs").rglob("*") if f.suffix in (".png", ".jpg", ".svg")]
    assert len(files) >= 3
    assert sum(f.stat().st_size for f in files) < 500_000
