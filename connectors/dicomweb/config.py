"""Settings of one DICOMweb server (a PACS or an archive)."""

from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, FilePath, SecretStr, field_validator, model_validator


class DicomwebConfig(BaseModel):
    """One DICOMweb server: where it is, how to sign in, how long to wait, how much to take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default="pacs", min_length=1, description="What error messages call this server.")
    url: str = Field(description="DICOMweb root, e.g. https://pacs.example/dicom-web; QIDO, WADO and STOW below it.")
    token: SecretStr | None = Field(default=None, description="Bearer token; excludes user and password.")
    user: str | None = Field(default=None, description="User of HTTP basic authentication.")
    password: SecretStr | None = Field(default=None, description="Password of HTTP basic authentication.")
    ca_file: FilePath | None = Field(default=None, description="PEM file of the CA that signed the server.")
    client_cert_file: FilePath | None = Field(default=None, description="PEM certificate for mutual TLS.")
    client_key_file: FilePath | None = Field(default=None, description="PEM key, if not in client_cert_file.")
    connect_timeout_s: float = Field(default=10.0, gt=0, description="Longest wait for a connection.")
    read_timeout_s: float = Field(default=60.0, gt=0, description="Longest silence while an answer arrives.")
    query_timeout_s: float = Field(default=120.0, gt=0, description="Longest one QIDO request may take in all.")
    study_timeout_s: float = Field(default=3600.0, gt=0, description="Longest one study retrieve may take in all.")
    store_timeout_s: float = Field(
        default=300.0, gt=0, description="Longest silence of the server after STOW bytes were sent."
    )
    max_study_bytes: int = Field(default=64 << 30, gt=0, description="A larger study is refused.")
    max_json_bytes: int = Field(default=128 << 20, gt=0, description="A larger QIDO or STOW answer is refused.")
    page_size: int = Field(default=1000, gt=0, le=100_000, description="QIDO `limit` of one request.")
    max_results: int = Field(default=100_000, gt=0, description="More QIDO matches than this are refused.")

    @field_validator("url")
    @classmethod
    def _plain_root(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be http://host[:port]/path or https://host[:port]/path")
        if parts.username or parts.password:
            raise ValueError("must not hold a user or password; use the settings user and password")
        if parts.query or parts.fragment:
            raise ValueError("must not hold a query or a fragment")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _one_sign_in(self) -> Self:
        if self.token and (self.user or self.password):
            raise ValueError("set either token, or user and password, not both")
        if bool(self.user) != bool(self.password):
            raise ValueError("user and password belong together")
        if self.client_key_file and not self.client_cert_file:
            raise ValueError("client_key_file needs client_cert_file")
        return self
