"""`wetread demo --once`: the simulator hospital, one study all the way through, and its own proof."""

import re
from pathlib import Path

import pytest

from tests.charts import REAL_STUDY
from tests.commands import assert_nothing_left, finish, start_wetread


@pytest.mark.parametrize("study", [None, REAL_STUDY], ids=["phantom", "real study"])
def test_every_system_received_what_it_should(study: Path | None, tmp_path: Path) -> None:
    more = ("--study", study) if study else ()
    child = start_wetread(tmp_path, "demo", "--once", *more)
    ended = finish(child, 180)
    assert ended.code == 0, ended.said
    assert "Traceback" not in ended.said
    assert re.search(r"All \d+ checks hold", ended.out)
    assert "no: " not in ended.out
    assert_nothing_left(child.pid, tmp_path / "tmp")


def test_a_study_that_is_not_there(tmp_path: Path) -> None:
    ended = finish(start_wetread(tmp_path, "demo", "--once", "--study", tmp_path / "nowhere"))
    assert ended.code == 2
    assert "nowhere is not a folder" in ended.said
