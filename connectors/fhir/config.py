"""Settings of one FHIR R4 server (an EHR)."""

from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, FilePath, SecretStr, field_validator


class FhirConfig(BaseModel):
    """One FHIR server: where it is, how to sign in, how long to wait, how much to take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default="ehr", min_length=1, description="What error messages call this server.")
    url: str = Field(description="FHIR base, e.g. https://ehr.example/fhir.")
    token: SecretStr | None = Field(default=None, description="Bearer token; none for an open server.")
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
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be http://host[:port]/path or https://host[:port]/path")
        if parts.username or parts.password:
            raise ValueError("must not hold a user or password; use the setting token")
        if parts.query or parts.fragment:
            raise ValueError("must not hold a query or a fragment")
        return url.rstrip("/")
