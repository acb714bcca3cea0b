"""Settings of one FHIR R4 server (an EHR)."""

import re
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, FilePath, SecretStr, field_validator, model_validator

from connectors.fhir.keys import read_keys

# RFC 6749, 3.3: scope-tokens, one space between two.
_SCOPES = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+( [\x21\x23-\x5b\x5d-\x7e]+)*")
_SCOPE = (
    "system/Patient.rs system/ServiceRequest.rs system/Condition.rs system/AllergyIntolerance.rs "
    "system/Observation.crus system/DiagnosticReport.crus system/ImagingStudy.crs system/Device.crs "
    "system/Provenance.crs system/Subscription.crus"
)


class OAuthConfig(BaseModel):
    """How we sign in by SMART Backend Services: who we are, by which keys, where, and for what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    client_id: str = Field(min_length=1, max_length=255, description="Our name at the authorization server.")
    key_files: tuple[FilePath, ...] = Field(
        min_length=1, description="Private keys: files of one PEM key or of a JWK set (`wetread keys new`)."
    )
    scope: str = Field(default=_SCOPE, description="Scopes to ask for, one space between two (SMART v2).")
    token_url: str = Field(
        default="", description="Token endpoint; empty: what .well-known/smart-configuration of the FHIR base names."
    )
    ca_file: FilePath | None = Field(
        default=None, description="PEM file of the CA that signed the token endpoint; not set: as for the FHIR server."
    )
    timeout_s: float = Field(default=15.0, gt=0, description="Longest one sign-in may take in all.")

    @field_validator("client_id")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not name.isascii() or not name.isprintable() or name != name.strip():
            raise ValueError("must be printable ASCII without a space at either end")
        return name

    @field_validator("key_files", mode="before")
    @classmethod
    def _one_or_more(cls, files: object) -> object:
        return (files,) if isinstance(files, str | Path) else files

    @field_validator("key_files")
    @classmethod
    def _usable_keys(cls, files: tuple[Path, ...]) -> tuple[Path, ...]:
        read_keys(files)
        return files

    @field_validator("scope")
    @classmethod
    def _scope_tokens(cls, scope: str) -> str:
        if not _SCOPES.fullmatch(scope):
            raise ValueError("must be scopes with one space between two, such as system/*.rs")
        return scope

    @field_validator("token_url")
    @classmethod
    def _plain_endpoint(cls, url: str) -> str:
        return _plain(url, "the sign-in is by key_files") if url else ""


class FhirConfig(BaseModel):
    """One FHIR server: where it is, how to sign in, how long to wait, how much to take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default="ehr", min_length=1, description="What error messages call this server.")
    url: str = Field(description="FHIR base, e.g. https://ehr.example/fhir.")
    token: SecretStr | None = Field(default=None, description="Bearer token; none for an open server.")
    oauth: OAuthConfig | None = Field(default=None, description="SMART Backend Services; excludes token.")
    ca_file: FilePath | None = Field(default=None, description="PEM file of the CA that signed the server.")
    connect_timeout_s: float = Field(default=10.0, gt=0, description="Longest wait for a connection.")
    read_timeout_s: float = Field(default=30.0, gt=0, description="Longest silence while an answer arrives.")
    request_timeout_s: float = Field(default=120.0, gt=0, description="Longest one request may take in all.")
    max_answer_bytes: int = Field(default=32 << 20, gt=0, description="A larger answer is refused.")
    max_pages: int = Field(default=50, gt=0, description="A search of more pages is refused.")
    max_resources: int = Field(default=5000, gt=0, description="A search of more matches is refused.")

    @field_validator("url")
    @classmethod
    def _plain_base(cls, url: str) -> str:
        return _plain(url, "use the setting token").rstrip("/")

    @model_validator(mode="after")
    def _one_way_in(self) -> Self:
        if self.oauth is None:
            return self
        if self.token is not None:
            raise ValueError("token and oauth are two ways to sign in; keep one of them")
        if self.url.startswith("https:") and self.oauth.token_url.startswith("http:"):
            raise ValueError("oauth.token_url must be https, as url is: who listens on the way could sign in as us")
        return self


def _plain(url: str, instead: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be http://host[:port]/path or https://host[:port]/path")
    if parts.username or parts.password:
        raise ValueError(f"must not hold a user or password; {instead}")
    if parts.query or parts.fragment:
        raise ValueError("must not hold a query or a fragment")
    return url
