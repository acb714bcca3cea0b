"""TLS of the listener: its context, and the names in a client certificate."""

import ssl
from typing import Any

from connectors.errors import Permanent
from connectors.mllp.listener_config import MllpListenerConfig

_SHORT = {
    "commonName": "CN",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "localityName": "L",
    "stateOrProvinceName": "ST",
}
Certificate = dict[str, Any]


def listener_tls_context(config: MllpListenerConfig) -> ssl.SSLContext | None:
    """TLS as the settings ask, None for plain TCP. With `ca_file` the handshake verifies client certificates."""
    if not config.tls or config.cert_file is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # No resumption: a client certificate is looked at anew on every connection.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    try:
        # An empty password makes an encrypted key fail here, where none would ask at the terminal.
        secret = config.key_password.get_secret_value() if config.key_password else ""
        context.load_cert_chain(config.cert_file, config.key_file, secret)
        if config.ca_file:
            context.load_verify_locations(config.ca_file)
            context.verify_mode = ssl.CERT_REQUIRED if config.require_client_cert else ssl.CERT_OPTIONAL
    except OSError as error:
        reason = type(error).__name__
        raise Permanent(f"{config.name}: cert_file, key_file or ca_file cannot be used ({reason}).") from error
    return context


def subject_of(certificate: Certificate) -> str:
    """The subject as one line (`CN=ris, O=Hospital`); its alternative names where the subject is empty."""
    parts = [f"{_SHORT.get(key, key)}={value}" for rdn in certificate.get("subject", ()) for key, value in rdn]
    return ", ".join(parts or [f"{kind}:{name}" for kind, name in _alternatives(certificate)])


def names_of(certificate: Certificate) -> set[str]:
    """Every common name and subject alternative name, case-folded."""
    common = [value for rdn in certificate.get("subject", ()) for key, value in rdn if key == "commonName"]
    return {str(name).casefold() for name in (*common, *(name for _, name in _alternatives(certificate)))}


def _alternatives(certificate: Certificate) -> list[tuple[str, str]]:
    """SANs that are plain text; a directory name is a tuple and is passed over."""
    return [(kind, name) for kind, name in certificate.get("subjectAltName", ()) if isinstance(name, str)]
