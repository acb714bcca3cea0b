"""Copies of the real study with one thing wrong, made of links where nothing changes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from tests.charts import DATA, REAL_STUDY

T2W, DWI, ADC, HBV = "4", "6", "7", "8"
MISSING_SLICE = DATA / "missing-slice"


def link_study(target: Path, *, series: tuple[str, ...] = ("3", T2W, "5", DWI, ADC, HBV, "9")) -> Path:
    """The real study (or some of its series, by number) as links below `target`."""
    for number in series:
        source = series_folder(REAL_STUDY, number)
        folder = target / source.name
        folder.mkdir(parents=True)
        for file in source.iterdir():
            (folder / file.name).symlink_to(file)
    return target


def series_folder(study: Path, number: str) -> Path:
    """The folder of the series of this number."""
    (folder,) = study.glob(f"{number}.*")
    return folder


def instances(study: Path, number: str) -> list[Path]:
    """The files of one series by name."""
    return sorted(series_folder(study, number).glob("*.dcm"))


def change(files: list[Path], edit: Callable[[Dataset], None]) -> None:
    """Put an edited copy in the place of each file."""
    for file in files:
        dataset = pydicom.dcmread(file)
        edit(dataset)
        file.unlink()
        dataset.save_as(file)


def cut(file: Path, share: float) -> None:
    """Put the first `share` of the file in its place, as a broken transfer leaves it."""
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: int(len(content) * share)])


def replace_series(study: Path, number: str, source: Path) -> None:
    """Put another folder's instances in the place of a series."""
    folder = series_folder(study, number)
    shutil.rmtree(folder)
    shutil.copytree(source, folder)
