"""Real servers that many tests share: one of each a pytest process, started when first asked for.

Run in parallel, tests of one file stay together (`--dist loadfile`): what a file sets up is set up once.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.hospital.ehr import RunningEhr, start_ehr
from deploy.hospital.pacs import RunningOrthanc, start_orthanc
from deploy.hospital.ris_process import RunningRis, start_ris
from deploy.triton.bundled import BundledTriton
from tests.crash.small_study import SmallStudy, build_small_truth
from tests.fixtures.triton_truth import build_truth_repository
from tests.fixtures.triton_truth.study import RealStudy, real_study

pytest.register_assert_rewrite("tests.backport_site", "tests.commands", "tests.serving")


@pytest.fixture(scope="session")
def truth() -> RealStudy:
    """The real study's truth masks."""
    return real_study()


@pytest.fixture(scope="session")
def truth_triton(tmp_path_factory: pytest.TempPathFactory, truth: RealStudy) -> Iterator[str]:
    """HOST:PORT of a real Triton whose prostate_reference answers the real study's truth, at once."""
    models = build_truth_repository(tmp_path_factory.mktemp("truth"), truth.gland, truth.zones, truth.lesion)
    with BundledTriton(models) as server:
        yield server.grpc_url


@pytest.fixture(scope="session")
def small_study(tmp_path_factory: pytest.TempPathFactory) -> SmallStudy:
    """Seven slices of the phantom, to be copied under other UIDs."""
    return SmallStudy(tmp_path_factory.mktemp("phantom"))


@pytest.fixture(scope="session")
def small_triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of a real Triton that answers the small study's truth, at once."""
    with BundledTriton(build_small_truth(tmp_path_factory.mktemp("models"))) as server:
        yield server.grpc_url


@pytest.fixture(scope="session")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningOrthanc]:
    """A real Orthanc, empty at first; each test uses studies of its own."""
    with start_orthanc(tmp_path_factory.mktemp("orthanc")) as server:
        yield server


@pytest.fixture(scope="session")
def ehr(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEhr]:
    """HAPI FHIR, or the in-memory server where there is no Java; each test uses patients of its own."""
    with start_ehr(tmp_path_factory.mktemp("ehr")) as server:
        yield server


@pytest.fixture
def ris(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRis]:
    """The simulator's RIS as a process of its own, with nothing received."""
    with start_ris(tmp_path_factory.mktemp("ris")) as server:
        yield server


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a result goes; not there yet."""
    return tmp_path / "out"
