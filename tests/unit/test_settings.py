"""Settings from file and environment: who wins, what is refused in one readable line, and that no secret is shown."""

import os
import traceback
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from connectors.dicomweb.config import DicomwebConfig
from mappings.inputs.fhir_to_event import NumberSystems
from middleware.errors import SettingsError
from middleware.settings import FolderPacs, RetrySettings, Settings, load_settings

SECRET = "s3cr3t-canary"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No WETREAD_* of the machine, and an empty working folder."""
    for name in [n for n in os.environ if n.upper().startswith("WETREAD_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(text: str | bytes, name: str = "wetread.yaml") -> Path:
    file = Path(name)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def complaints(text: str | bytes = "", **environment: str) -> list[str]:
    file = write(text)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(SettingsError) as refused:
            load_settings(file)
    shown = "".join(traceback.format_exception(refused.value))
    assert SECRET not in shown
    return str(refused.value).splitlines()


def test_nothing_set_works() -> None:
    settings = load_settings()
    assert (settings.pacs, settings.ehr, settings.ris, settings.triton) == (None, None, None, None)
    assert settings.zone == ZoneInfo("UTC")
    assert settings.store_url == f"sqlite:///{Path.cwd()}/wetread-data/wetread.sqlite"
    assert settings.workflow_url == f"sqlite:///{Path.cwd()}/wetread-data/workflow.sqlite"


def test_file_is_read_with_its_nested_settings() -> None:
    write(
        "data_dir: /tmp/w\nsite: {time_zone: Europe/Amsterdam}\n"
        "pacs: {url: 'https://pacs.example/dicom-web/', read_timeout_s: 5}\n"
        "ehr: {url: https://ehr.example/fhir, patient_identifier_system: 'urn:oid:1.2'}\n"
        "ris: {host: ris.example, port: 2575, receiving_facility: NORTH}\n"
        "triton: {url: 'triton.example:8001', tls: {}}\n"
    )
    settings = load_settings()
    assert settings.data_dir == Path("/tmp/w")
    assert settings.zone == ZoneInfo("Europe/Amsterdam")
    assert isinstance(settings.pacs, DicomwebConfig)
    assert (settings.pacs.url, settings.pacs.read_timeout_s) == ("https://pacs.example/dicom-web", 5.0)
    assert settings.ehr is not None
    assert settings.ehr.patient_identifier_system == "urn:oid:1.2"
    assert settings.ris is not None
    assert (settings.ris.port, settings.ris.receiving_facility) == (2575, "NORTH")
    assert settings.triton is not None
    assert settings.triton.tls is not None


EVENTS = "callback_url: 'https://w.example/fhir/notifications'"


def test_what_is_heard_from_the_ehr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WETREAD_EHR_EVENTS__TOKEN", f"{SECRET}-of-16")
    write(
        "ehr: {url: 'https://ehr.example/fhir', patient_identifier_system: 'urn:mrn'}\n"
        f"ehr_events: {{{EVENTS}, accession_system: 'urn:acc', filters: {{ServiceRequest: category=x}}}}"
    )
    settings = load_settings()
    assert settings.ehr_events is not None
    assert settings.ehr_events.filters == {"ServiceRequest": "category=x"}
    assert settings.number_systems == NumberSystems(accession="urn:acc", patient="urn:mrn")
    assert SECRET not in repr(settings)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"ehr_events: {{{EVENTS}}}", ["ehr_events: there is no EHR to hear from: set ehr.url"]),
        (
            f"ehr: {{url: 'http://x'}}\nehr_events: {{{EVENTS}, kind: backport}}",
            ["ehr_events: kind backport needs topics for ServiceRequest and ImagingStudy"],
        ),
        (
            "ehr: {url: 'http://x'}\nehr_events: {callback_url: 'https://w.example/'}",
            [
                "ehr_events.callback_url: must be http://host[:port]/fhir/notifications or "
                "https://host[:port]/fhir/notifications"
            ],
        ),
        (
            f"ehr: {{url: 'http://x'}}\nehr_events: {{{EVENTS}, resources: [Observation]}}",
            [
                "ehr_events.resources.0: Input should be 'Patient', 'ServiceRequest' or 'ImagingStudy'",
                "ehr_events.resources: Tuple should have at least 1 item",
            ],
        ),
        (f"ehr: {{url: 'http://x'}}\nehr_events: {{{EVENTS}, poll_s: 0}}", ["ehr_events.poll_s: Input should be g"]),
        (f"ehr: {{url: nonsense}}\nehr_events: {{{EVENTS}}}", ["ehr.url: must be http"]),
    ],
)
def test_mistakes_in_what_is_heard_from_the_ehr(text: str, says: list[str]) -> None:
    lines = complaints(text, WETREAD_EHR_EVENTS__TOKEN=f"{SECRET}-of-16")
    assert len(lines) == len(says)
    for line, each in zip(lines, says, strict=True):
        assert line.startswith(f"wetread.yaml or WETREAD_*: {each}")


def test_token_of_the_callback_is_long_and_comes_from_the_environment() -> None:
    text = f"ehr: {{url: 'http://x'}}\nehr_events: {{{EVENTS}}}"
    assert complaints(text) == ["wetread.yaml or WETREAD_*: ehr_events.token: Field required"]
    assert "ehr_events.token" in complaints(text, WETREAD_EHR_EVENTS__TOKEN=SECRET)[0]
    (line,) = complaints(text.replace("ehr_events: {", f"ehr_events: {{token: {SECRET}-of-16, "))
    assert "ehr_events.token is a secret" in line


def test_folder_in_the_place_of_a_pacs() -> None:
    write("pacs: {folder: /tmp/images}")
    assert load_settings().pacs == FolderPacs(folder=Path("/tmp/images"))


def test_arguments_win_over_environment_which_wins_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write("executor_id: file\nconcurrent_readings: 3\npacs: {url: 'http://file', read_timeout_s: 7}")
    monkeypatch.setenv("WETREAD_EXECUTOR_ID", "environment")
    monkeypatch.setenv("WETREAD_PACS__URL", "http://environment")
    settings = load_settings()
    assert (settings.executor_id, settings.concurrent_readings) == ("environment", 3)
    assert isinstance(settings.pacs, DicomwebConfig)
    assert (settings.pacs.url, settings.pacs.read_timeout_s) == ("http://environment", 7.0)
    assert Settings(executor_id="argument").executor_id == "argument"


def test_file_named_by_argument_wins_over_the_variable_which_wins_over_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write("executor_id: default")
    other, third = write("executor_id: variable", "a.yaml"), write("executor_id: argument", "b.yaml")
    assert load_settings().executor_id == "default"
    monkeypatch.setenv("WETREAD_CONFIG", str(other))
    assert load_settings().executor_id == "variable"
    assert load_settings(third).executor_id == "argument"
    assert os.environ["WETREAD_CONFIG"] == str(other), "loading leaves the environment as it was"


def test_environment_is_left_as_it_was_after_an_error() -> None:
    complaints("foo: 1")
    assert "WETREAD_CONFIG" not in os.environ


def test_secrets_are_kept_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WETREAD_PACS__URL", "http://pacs")
    monkeypatch.setenv("WETREAD_PACS__TOKEN", SECRET)
    monkeypatch.setenv("WETREAD_EHR__URL", "http://ehr")
    monkeypatch.setenv("WETREAD_EHR__TOKEN", SECRET)
    monkeypatch.setenv("WETREAD_DATABASE_URL", f"postgresql://user:{SECRET}@db/wetread")
    settings = load_settings()
    assert isinstance(settings.pacs, DicomwebConfig)
    assert settings.pacs.token is not None
    assert settings.pacs.token.get_secret_value() == SECRET
    assert SECRET not in f"{settings!r} {settings} {settings.pacs!r} {settings.ehr}"
    assert settings.store_url == f"postgresql+psycopg://user:{SECRET}@db/wetread"
    assert settings.workflow_url == f"postgresql://user:{SECRET}@db/wetread"


ENVIRONMENT: dict[str, Any] = {"WETREAD_PACS__TOKEN": SECRET, "WETREAD_DATABASE_URL": f"postgresql://u:{SECRET}@db/w"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("foo: 1", ["foo: there is no such setting"]),
        ("site: {zone: UTC}", ["site.zone: there is no such setting"]),
        ("pacs: {url: 'http://x', tokn: a}", ["pacs.tokn: there is no such setting"]),
        ("pacs: {folder: /tmp, x: 1}", ["pacs.x: there is no such setting"]),
        ("pacs: {url: 'http://x', folder: /tmp}", ["pacs.url: there is no such setting"]),
        ("pacs: {}", ["pacs.url: Field required"]),
        ("pacs: https://x", ["pacs: Input should be a valid dictionary or instance of DicomwebConfig"]),
        ("pacs: {url: 'ftp://x'}", ["pacs.url: must be http://host[:port]/path or https://host[:port]/path"]),
        (
            "pacs: {url: 'http://u:p@x'}",
            ["pacs.url: must not hold a user or password; use the settings user and password"],
        ),
        ("pacs: {url: 'http://x', user: me}", ["pacs: user and password belong together"]),
        (
            "ehr: {url: nonsense}\nris: {host: a}",
            [
                "ehr.url: must be http://host[:port]/path or https://host[:port]/path",
                "ris.port: Field required",
            ],
        ),
        (
            "triton: {url: 'http://x:8001'}",
            ["triton.url: must be host:port of Triton's gRPC port, such as triton.example:8001, without a scheme"],
        ),
        (
            "site: {time_zone: Mars/Base}",
            ["site.time_zone: 'Mars/Base' is not an IANA time zone such as Europe/Amsterdam"],
        ),
        ("api: {port: 99999}", ["api.port: Input should be less than or equal to 65535"]),
        ("concurrent_readings: 0", ["concurrent_readings: Input should be greater than or equal to 1"]),
        ("database_url: mysql://x", ["database_url: must start with postgresql:// or sqlite:///"]),
        ("ris: {host: a, port: 1, processing_id: Q}", ["ris.processing_id: Input should be 'P', 'T' or 'D'"]),
    ],
)
def test_each_mistake_is_one_readable_line(text: str, says: list[str]) -> None:
    assert complaints(text) == [f"wetread.yaml or WETREAD_*: {each}" for each in says]


@pytest.mark.parametrize("text", ["pacs: {url: 'ftp://x'}", "foo: 1", "site: {time_zone: Mars}"])
def test_mistakes_do_not_show_the_secrets_beside_them(text: str) -> None:
    assert complaints(text, **({**ENVIRONMENT, "WETREAD_PACS__URL": "http://x"} if "pacs" not in text else ENVIRONMENT))


def test_database_of_another_kind_does_not_show_its_password() -> None:
    (line,) = complaints(WETREAD_DATABASE_URL=f"mysql://u:{SECRET}@db/w")
    assert line.endswith("database_url: must start with postgresql:// or sqlite:///")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b", "wetread.yaml:1: must be a mapping of settings"),
        ("just words", "wetread.yaml:1: must be a mapping of settings"),
        ("1: 2", "wetread.yaml:1: must be a mapping of settings"),
        ("a: 1\nb: [", "wetread.yaml:2: not valid YAML: "),
        ("a: 1\n\tb: 2", "wetread.yaml:2: not valid YAML: "),
        (b"a: \xff\xfe", "wetread.yaml: cannot be read as YAML"),
        ("a: !!python/name:os.system", "wetread.yaml:1: not valid YAML: "),
    ],
)
def test_what_is_no_settings_file_is_refused(text: str | bytes, says: str) -> None:
    (line,) = complaints(text)
    assert line.startswith(says)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (
            "WETREAD_DATABASE_UL",
            "x",
            "WETREAD_DATABASE_UL: there is no such setting; did you mean WETREAD_DATABASE",
        ),
        ("WETREAD_PAC__TOKEN", SECRET, "WETREAD_PAC__TOKEN: there is no such setting; did you mean WETREAD_PACS?"),
        ("WETREAD_SITE", "{", 'WETREAD_*: error parsing value for field "site"'),
        ("WETREAD_PACS__TOKN", SECRET, "wetread.yaml or WETREAD_*: pacs."),
        ("WETREAD_API__PORT", "many", "wetread.yaml or WETREAD_*: api.port: Input should be a valid integer"),
    ],
)
def test_mistakes_in_the_environment_are_refused(name: str, value: str, says: str) -> None:
    assert any(line.startswith(says) for line in complaints("", **{name: value}))


def test_variables_of_others_are_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WETREAD_SERVICE_HOST", "WETREAD_PORT_8040_TCP", "WETREAD_DEBUG", "WETREAD_SITE_PACKAGES"):
        monkeypatch.setenv(name, "x")
    assert load_settings().pacs is None


def test_named_file_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for missing in (Path("absent.yaml"), tmp_path):
        with pytest.raises(SettingsError, match="is not there"):
            load_settings(missing)
    monkeypatch.setenv("WETREAD_CONFIG", "absent.yaml")
    with pytest.raises(SettingsError, match=r"settings file absent\.yaml is not there"):
        load_settings()


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().executor_id = "other"


def test_waits_double_up_to_the_longest_and_never_undercut_the_peer() -> None:
    retry = RetrySettings(first_wait_s=1, longest_wait_s=10)
    assert [retry.wait_s(n) for n in (1, 2, 3, 4, 5, 6, 5000)] == [1, 2, 4, 8, 10, 10, 10]
    assert retry.wait_s(1, 42.0) == 42.0
    assert retry.wait_s(5, 3.0) == 10.0
