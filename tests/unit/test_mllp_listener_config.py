"""Listener settings refuse what cannot work, or what would leave the door more open than it reads."""

from typing import Any

import pytest
from pydantic import ValidationError

from connectors.mllp.listener_config import MllpListenerConfig
from tests.unit.test_connectors_checklists import ROOT, checklist, defined_in

TLS = {"tls": True, "cert_file": __file__}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"port": 65536}, "port"),
        ({"prot": 1}, "prot"),
        ({"cert_file": __file__}, "cert_file need tls"),
        ({"ca_file": __file__}, "ca_file need tls"),
        ({"tls": True}, "needs cert_file"),
        ({"tls": True, "cert_file": "/nowhere.pem"}, "cert_file"),
        ({**TLS, "require_client_cert": True}, "needs ca_file"),
        ({**TLS, "allowed_subjects": ["ris"]}, "allowed_subjects needs ca_file"),
        (
            {**TLS, "ca_file": __file__, "require_client_cert": False, "allowed_subjects": ["ris"]},
            "allowed_subjects needs",
        ),
        ({"allowed_peers": ["ris.local"]}, "allowed_peers"),
        ({"allowed_peers": ["10.0.0.1/8"]}, "allowed_peers"),
        ({"max_message_bytes": 10, "max_buffered_bytes": 9}, "max_buffered_bytes"),
        ({"frame_timeout_s": 0}, "frame_timeout_s"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        MllpListenerConfig.model_validate(settings)


def test_defaults_are_local_and_limited_and_a_ca_makes_tls_mutual() -> None:
    config = MllpListenerConfig()
    assert (config.host, config.max_message_bytes, config.tls) == ("127.0.0.1", 32 * 1024 * 1024, False)
    assert MllpListenerConfig.model_validate({**TLS, "ca_file": __file__}).require_client_cert


def test_every_setting_says_what_it_is_and_secrets_are_not_printed() -> None:
    assert [name for name, field in MllpListenerConfig.model_fields.items() if not field.description] == []
    config = MllpListenerConfig.model_validate({**TLS, "key_password": "s3cret"})
    assert "s3cret" not in f"{config!r} {config.model_dump_json()}"


def test_listener_part_of_the_checklist_names_tests_that_exist() -> None:
    for name, item in checklist("mllp").items():
        path, _, test = item["listener"].partition("::")
        if not path.startswith("exempt: "):
            assert (ROOT / path).is_file(), name
            assert not test or test in defined_in(ROOT / path), name
