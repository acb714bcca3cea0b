"""Connector settings refuse what cannot work, and never print a secret."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from connectors.dicomweb.client import DicomwebClient
from connectors.dicomweb.config import DicomwebConfig
from connectors.errors import Permanent
from connectors.fhir.client import FhirClient
from connectors.fhir.config import FhirConfig, OAuthConfig
from connectors.mllp.client import MllpClient
from connectors.mllp.config import MllpConfig
from connectors.orthanc.client import OrthancChanges
from connectors.orthanc.config import OrthancConfig
from tests.signing_keys import make_key, write_pem

URL = "https://pacs.example/dicom-web"


@pytest.mark.parametrize(
    ("model", "settings", "told"),
    [
        (DicomwebConfig, {}, "url"),
        (DicomwebConfig, {"url": "pacs.example"}, "must be http"),
        (DicomwebConfig, {"url": "ftp://pacs.example"}, "must be http"),
        (DicomwebConfig, {"url": "https://u:p@pacs.example"}, "user or password"),
        (DicomwebConfig, {"url": f"{URL}?x=1"}, "query"),
        (DicomwebConfig, {"url": URL, "token": "t", "user": "u", "password": "p"}, "not both"),
        (DicomwebConfig, {"url": URL, "user": "u"}, "belong together"),
        (DicomwebConfig, {"url": URL, "client_key_file": __file__}, "client_cert_file"),
        (DicomwebConfig, {"url": URL, "ca_file": "/nowhere.pem"}, "ca_file"),
        (DicomwebConfig, {"url": URL, "connect_timeout_s": 0}, "connect_timeout_s"),
        (DicomwebConfig, {"url": URL, "pasword": "x"}, "pasword"),
        (FhirConfig, {"url": "https://u:p@ehr.example"}, "user or password"),
        (FhirConfig, {"url": "ehr"}, "must be http"),
        (FhirConfig, {"url": "https://ehr.example#x"}, "fragment"),
        (FhirConfig, {"url": "https://ehr.example", "max_pages": 0}, "max_pages"),
        (FhirConfig, {"url": URL, "oauth": {}}, "client_id"),
        (FhirConfig, {"url": URL, "oauth": {"client_id": "w"}}, "key_files"),
        (FhirConfig, {"url": URL, "oauth": {"client_id": "w", "key_files": []}}, "key_files"),
        (FhirConfig, {"url": URL, "oauth": {"client_id": "w", "key_files": "/nowhere.pem"}}, "key_files"),
        (FhirConfig, {"url": URL, "oauth": {"client_id": "w", "key_files": __file__}}, "neither a private key in PEM"),
        (FhirConfig, {"url": URL, "oauth": {"client_id": " w", "key_files": __file__}}, "printable ASCII"),
        (FhirConfig, {"url": URL, "oauth": {"client_id": "w\n", "key_files": __file__}}, "printable ASCII"),
        (FhirConfig, {"url": URL, "oauth": {"client_id": "w", "scope": "a  b"}}, "one space between two"),
        (FhirConfig, {"url": URL, "oauth": {"client_id": "w", "scope": ""}}, "one space between two"),
        (FhirConfig, {"url": URL, "oauth": {"client_id": "w", "token_url": "ehr/token"}}, "must be http"),
        (FhirConfig, {"url": URL, "oauth": {"client_id": "w", "token_url": "https://u:p@x/t"}}, "user or password"),
        (FhirConfig, {"url": URL, "oauth": {"client_id": "w", "timeout_s": 0}}, "timeout_s"),
        (OrthancConfig, {"url": "pacs.example"}, "must be http"),
        (OrthancConfig, {"url": "https://u:p@pacs.example"}, "user or password"),
        (OrthancConfig, {"url": "https://pacs.example?x=1"}, "query"),
        (OrthancConfig, {"url": "https://pacs.example", "password": "p"}, "belong together"),
        (OrthancConfig, {"url": "https://pacs.example", "page_size": 0}, "page_size"),
        (MllpConfig, {"host": "ris", "port": 0}, "port"),
        (MllpConfig, {"host": "ris", "port": 2575, "ca_file": __file__}, "need tls"),
        (MllpConfig, {"host": "ris", "port": 2575, "encoding": "utf-ate"}, "character set"),
        (MllpConfig, {"host": "ris", "port": 2575, "tls": True, "client_key_file": __file__}, "client_cert_file"),
    ],
)
def test_wrong_settings_are_named(model: type[BaseModel], settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        model.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "oauth", "told"),
    [
        ({"token": "t"}, {}, "two ways to sign in; keep one of them"),
        ({}, {"token_url": "http://ehr.example/token"}, "oauth.token_url must be https, as url is"),
    ],
)
def test_a_sign_in_that_contradicts_the_rest_is_refused(
    settings: dict[str, Any], oauth: dict[str, Any], told: str, tmp_path: Path
) -> None:
    key = write_pem(tmp_path / "key.pem", make_key())
    with pytest.raises(ValidationError, match=told):
        FhirConfig.model_validate({"url": URL, **settings, "oauth": {"client_id": "w", "key_files": key, **oauth}})


def test_secrets_are_not_printed_and_settings_cannot_change() -> None:
    for config in (
        DicomwebConfig.model_validate({"url": URL, "token": "s3cret"}),
        DicomwebConfig.model_validate({"url": URL, "user": "u", "password": "s3cret"}),
        FhirConfig.model_validate({"url": URL, "token": "s3cret"}),
        OrthancConfig.model_validate({"url": URL, "user": "u", "password": "s3cret"}),
    ):
        assert "s3cret" not in f"{config!r} {config} {config.model_dump_json()}"
        with pytest.raises(ValidationError, match="frozen"):
            setattr(config, "name", "other")  # noqa: B010 - mypy knows that it cannot be set


@pytest.mark.parametrize("model", [DicomwebConfig, FhirConfig, OAuthConfig, MllpConfig, OrthancConfig])
def test_every_setting_says_what_it_is(model: type[BaseModel]) -> None:
    assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_unusable_ca_file_is_permanent(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("not a certificate")
    makers = (
        lambda: DicomwebClient(DicomwebConfig(url=URL, ca_file=ca)),
        lambda: FhirClient(FhirConfig(url=URL, ca_file=ca)),
        lambda: OrthancChanges(OrthancConfig(url=URL, ca_file=ca)),
        lambda: MllpClient(MllpConfig(host="ris", port=1, tls=True, ca_file=ca)),
    )
    for make in makers:
        with pytest.raises(Permanent, match="ca_file"):
            make()
