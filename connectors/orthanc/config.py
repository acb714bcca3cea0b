"""Settings of Orthanc's own REST API, of which only `/changes` is used."""

from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, FilePath, SecretStr, field_validator, model_validator


class OrthancConfig(BaseModel):
    """One Orthanc: where its REST API is, how to sign in, how long to wait, how much to take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default="orthanc", min_length=1, description="What error messages call this server.")
    url: str = Field(description="Root of the REST API, e.g. https://pacs.example:8042; not the DICOMweb root.")
    user: str | None = Field(default=None, description="User of HTTP basic authentication.")
    password: SecretStr | None = Field(default=None, description="Password of HTTP basic authentication.")
    ca_file: FilePath | None = Field(default=None, description="PEM file of the CA that signed the server.")
    connect_timeout_s: float = Field(default=10.0, gt=0, description="Longest wait for a connection.")
    read_timeout_s: float = Field(default=30.0, gt=0, description="Longest silence while an answer arrives.")
    request_timeout_s: float = Field(default=60.0, gt=0, description="Longest one request may take in all.")
    max_answer_bytes: int = Field(default=8 << 20, gt=0, description="A larger answer is refused.")
    page_size: int = Field(default=100, gt=0, le=10_000, description="Changes asked for at a time.")

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
    def _whole_sign_in(self) -> Self:
        if bool(self.user) != bool(self.password):
            raise ValueError("user and password belong together")
        return self
