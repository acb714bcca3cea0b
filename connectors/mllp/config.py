"""Settings of one MLLP receiver (a RIS or an interface engine)."""

import codecs
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, FilePath, SecretStr, field_validator, model_validator


class MllpConfig(BaseModel):
    """One MLLP receiver: where it listens, how to secure the line, how long to wait for its answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default="ris", min_length=1, description="What error messages call this receiver.")
    host: str = Field(min_length=1, description="Host name or address.")
    port: int = Field(ge=1, le=65535, description="TCP port.")
    tls: bool = Field(default=False, description="Speak TLS on the connection.")
    ca_file: FilePath | None = Field(default=None, description="PEM file of the CA that signed the receiver.")
    client_cert_file: FilePath | None = Field(default=None, description="PEM certificate for mutual TLS.")
    client_key_file: FilePath | None = Field(default=None, description="PEM key, if not in client_cert_file.")
    client_key_password: SecretStr | None = Field(default=None, description="Password of that key.")
    connect_timeout_s: float = Field(default=10.0, gt=0, description="Longest wait for a connection, TLS included.")
    ack_timeout_s: float = Field(default=30.0, gt=0, description="Longest wait for the answer to a message.")
    wait_for_application_ack: bool = Field(
        default=False, description="Enhanced mode: after CA, wait for AA, AE or AR on the same connection."
    )
    duplicate_safe: bool = Field(
        default=False,
        description="The receiver drops a second message of the same MSH-10. Whoever sends may then repeat what "
        "ended ambiguous; this connector itself never does.",
    )
    max_ack_bytes: int = Field(default=1 << 20, gt=0, description="A larger answer is refused.")
    encoding: str = Field(default="utf-8", description="Character set to read answers in, as Python names it.")

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, encoding: str) -> str:
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise ValueError("is not a character set that Python knows") from None
        return encoding

    @model_validator(mode="after")
    def _tls_whole(self) -> Self:
        if not self.tls and (self.ca_file or self.client_cert_file):
            raise ValueError("ca_file and client_cert_file need tls: true")
        if (self.client_key_file or self.client_key_password) and not self.client_cert_file:
            raise ValueError("client_key_file and client_key_password need client_cert_file")
        return self
