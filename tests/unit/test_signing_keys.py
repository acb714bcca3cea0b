"""`wetread keys`: the file is whole at every moment, its readers stay who they were, mistakes are told in a line."""

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from middleware.errors import SettingsError
from middleware.settings import load_settings
from middleware.signing_keys import list_signing_keys, make_signing_key
from tests.signing_keys import entry, make_key, write_pem, write_set

QUIET = Console(quiet=True)
DAY = 86_400.0


def kids(file: Path) -> list[str]:
    return [each["kid"] for each in json.loads(file.read_text())["keys"]]


def test_a_new_file_is_for_its_owner_and_a_changed_one_for_whom_it_was(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    make_signing_key(file, "ES384", DAY, QUIET)
    assert file.stat().st_mode & 0o777 == 0o600
    os.chmod(file, 0o640)
    os.chown(file, os.getuid(), os.getgid())
    (first,) = kids(file)
    make_signing_key(file, "RS384", DAY, QUIET)
    assert kids(file)[1:] == [first]
    assert file.stat().st_mode & 0o777 == 0o640
    assert [each.name for each in tmp_path.iterdir()] == ["keys.json"]


def test_a_jwk_becomes_a_set_and_keeps_its_name(tmp_path: Path) -> None:
    file = tmp_path / "key.json"
    file.write_text(json.dumps(entry(make_key(), "registered")))
    make_signing_key(file, "ES384", DAY, QUIET)
    assert kids(file)[1:] == ["registered"]


@pytest.mark.parametrize("content", ["{", '{"keys": []}', '{"keys": [{"kty": "EC"}]}', "text"])
def test_a_file_that_is_no_set_of_keys_stays_as_it_is(content: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    for _ in range(2):
        with pytest.raises(SettingsError, match=f"keys new: {file}: "):
            make_signing_key(file, "ES384", DAY, QUIET)
        with pytest.raises(SettingsError, match=f"keys list: {file}: "):
            list_signing_keys([file], False, QUIET)
    assert file.read_text() == content
    assert [each.name for each in tmp_path.iterdir()] == ["keys.json"]


def test_a_pem_key_is_not_replaced(tmp_path: Path) -> None:
    file = write_pem(tmp_path / "key.pem", make_key())
    before = file.read_bytes()
    with pytest.raises(SettingsError, match="is a PEM key, which has no place for times"):
        make_signing_key(file, "ES384", DAY, QUIET)
    assert file.read_bytes() == before


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        make_signing_key(tmp_path / "nowhere" / "keys.json", "ES384", DAY, QUIET)


def test_the_start_is_refused_with_one_line_that_names_file_and_key(tmp_path: Path) -> None:
    key = make_key()
    keys = write_set(tmp_path / "keys.json", entry(key, None))
    config = tmp_path / "wetread.yaml"
    config.write_text(f"ehr: {{url: 'https://ehr.example', oauth: {{client_id: w, key_files: ['{keys}']}}}}")
    with pytest.raises(SettingsError) as refused:
        load_settings(config)
    told = str(refused.value)
    assert told == (
        f"{config} or WETREAD_*: ehr.oauth.key_files: {keys}: key 1: has no kid; "
        "give it the one by which the server knows it"
    )
    assert str(key.as_dict(private=True)["d"]) not in told


def test_one_file_may_stand_without_a_list_also_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_pem(tmp_path / "key.pem", make_key())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WETREAD_EHR__URL", "https://ehr.example")
    monkeypatch.setenv("WETREAD_EHR__OAUTH__CLIENT_ID", "w")
    monkeypatch.setenv("WETREAD_EHR__OAUTH__KEY_FILES", json.dumps([str(file)]))
    ehr = load_settings().ehr
    assert ehr is not None
    assert ehr.oauth is not None
    assert ehr.oauth.key_files == (file,)
