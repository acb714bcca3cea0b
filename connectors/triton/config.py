"""Settings of one Triton Inference Server."""

import re
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, FilePath, field_validator, model_validator


class TritonTls(BaseModel):
    """TLS to the server's gRPC port; without any file, the system's certificate authorities are trusted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ca_file: FilePath | None = Field(default=None, description="PEM file of the CA that signed the server.")
    client_cert_file: FilePath | None = Field(default=None, description="PEM certificate for mutual TLS.")
    client_key_file: FilePath | None = Field(default=None, description="PEM key of client_cert_file.")
    server_name: str | None = Field(
        default=None, min_length=1, description="Name in the server's certificate, if not the host of url."
    )

    @model_validator(mode="after")
    def _certificate_with_key(self) -> Self:
        if bool(self.client_cert_file) != bool(self.client_key_file):
            raise ValueError("client_cert_file and client_key_file belong together")
        return self


class TritonConfig(BaseModel):
    """One Triton server: where its gRPC port is, how long to wait, how much to carry."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default="triton", min_length=1, description="What error messages call this server.")
    url: str = Field(description="host:port of the gRPC port (8001 by default in Triton), without a scheme.")
    tls: TritonTls | None = Field(default=None, description="Set (even empty) to speak TLS.")
    connect_timeout_s: float = Field(default=10.0, gt=0, description="Longest wait for a connection.")
    control_timeout_s: float = Field(default=10.0, gt=0, description="Longest wait for readiness or metadata.")
    deadline_s: float = Field(default=120.0, gt=0, description="Longest wait for one inference, queue included.")
    max_message_bytes: int = Field(
        default=(1 << 31) - 1, gt=0, lt=1 << 31, description="A larger request or answer is refused."
    )
    priority: int = Field(
        default=0,
        ge=0,
        description="Triton priority level where a call names none; 1 is the most urgent, "
        "0 leaves it to the model's default_priority_level.",
    )

    @field_validator("url")
    @classmethod
    def _host_and_port(cls, url: str) -> str:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})", url)
        if not match or not 0 < int(match[2]) < 65536:
            raise ValueError("must be host:port of Triton's gRPC port, such as triton.example:8001, without a scheme")
        return url
