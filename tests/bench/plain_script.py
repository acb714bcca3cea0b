"""The rival of bench_end_to_end: one prostate study read by a plain script, as the libraries' guides show it."""

from collections.abc import Sequence

import highdicom
import numpy as np
import numpy.typing as npt
import requests
import SimpleITK as sitk
import tritonclient.grpc as grpcclient  # type: ignore[import-untyped]
from dicomweb_client.api import DICOMwebClient
from highdicom.seg import SegmentDescription
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

T2_SERIES, ADC_SERIES, HBV_SERIES = 4, 7, 8


def read_plainly(study_uid: str, dicomweb_url: str, triton_url: str) -> None:
    """Fetch, resample, ask the model, write a SEG, store it; the series are known beforehand."""
    session = requests.Session()
    session.trust_env = False  # a proxy in the environment is never the way to a loopback port
    pacs = DICOMwebClient(dicomweb_url, session=session)
    instances = pacs.retrieve_study(study_uid)
    t2, adc, hbv = (_series(instances, number) for number in (T2_SERIES, ADC_SERIES, HBV_SERIES))
    grid = _image(t2)
    volumes = [sitk.GetArrayFromImage(i) for i in (grid, _on_grid(_image(adc), grid), _on_grid(_image(hbv), grid))]
    spacing = np.array(grid.GetSpacing()[::-1], np.float32)
    gland, zones, lesions = _ask(triton_url, [*volumes, spacing])
    pixels = np.stack([gland == 1, zones == 1, zones == 2, lesions == 1], axis=-1).astype(np.uint8)
    pacs.store_instances([_segmentation(t2, pixels)])


def _series(instances: Sequence[Dataset], number: int) -> list[Dataset]:
    chosen = [each for each in instances if each.SeriesNumber == number]
    row, column = np.array(chosen[0].ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(row, column)
    return sorted(chosen, key=lambda each: float(normal @ np.array(each.ImagePositionPatient, float)))


def _image(datasets: Sequence[Dataset]) -> sitk.Image:
    row, column = np.array(datasets[0].ImageOrientationPatient, float).reshape(2, 3)
    first, last = (np.array(datasets[i].ImagePositionPatient, float) for i in (0, -1))
    image = sitk.GetImageFromArray(np.stack([each.pixel_array for each in datasets]).astype(np.float32))
    down, across = (float(each) for each in datasets[0].PixelSpacing)
    image.SetSpacing((across, down, float(np.linalg.norm(last - first)) / (len(datasets) - 1)))
    image.SetOrigin(first.tolist())
    image.SetDirection(np.stack([row, column, np.cross(row, column)], axis=1).ravel().tolist())
    return image


def _on_grid(image: sitk.Image, grid: sitk.Image) -> sitk.Image:
    return sitk.Resample(image, grid, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32)


def _ask(url: str, arrays: Sequence[npt.NDArray[np.float32]]) -> list[npt.NDArray[np.uint8]]:
    with grpcclient.InferenceServerClient(url) as client:
        inputs = []
        for name, array in zip(("t2w", "adc", "hbv", "spacing"), arrays, strict=True):
            tensor = grpcclient.InferInput(name, list(array.shape), "FP32")
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        answer = client.infer("prostate_reference", inputs, model_version="1")
        return [answer.as_numpy(name) for name in ("gland", "zones", "lesions")]


def _segmentation(sources: list[Dataset], pixels: npt.NDArray[np.uint8]) -> Dataset:
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="rival", version="1", family=codes.DCM.ArtificialIntelligence
    )
    descriptions = [
        SegmentDescription(
            segment_number=number,
            segment_label=label,
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.Prostate,
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
        )
        for number, label in enumerate(("gland", "peripheral zone", "transition zone", "lesion"), 1)
    ]
    return highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=pixels,
        segmentation_type="BINARY",
        segment_descriptions=descriptions,
        series_instance_uid=highdicom.UID(),
        series_number=1001,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="rival",
        manufacturer_model_name="rival",
        software_versions="1",
        device_serial_number="1",
    )
