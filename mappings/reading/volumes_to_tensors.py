"""Volumes to the model's input tensors: everything on the reference grid, in the protocol's names."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from mappings.model.protocol import Protocol
from mappings.model.study import Geometry, Volume


class FramesDiffer(ValueError):
    """Two volumes do not share a frame of reference, so their positions cannot be compared."""


def resample(volume: Volume, grid: Geometry) -> Volume:
    """`volume` by linear interpolation on `grid`; NaN outside its field of view.

    Raises FramesDiffer where the frames of reference differ.
    """
    if volume.geometry.frame_of_reference_uid != grid.frame_of_reference_uid:
        raise FramesDiffer("the series has another frame of reference than the reference series")
    if volume.geometry == grid:
        return volume
    moved = sitk.Resample(
        _to_image(volume),
        _empty_image(grid),
        sitk.Transform(3, sitk.sitkIdentity),
        sitk.sitkLinear,
        float("nan"),
        sitk.sitkFloat32,
    )
    array = np.ascontiguousarray(sitk.GetArrayFromImage(moved))
    return replace(volume, array=array, geometry=grid, sop_instance_uids=())


def _place(image: sitk.Image, grid: Geometry) -> sitk.Image:
    z, y, x = grid.spacing_mm
    image.SetSpacing((x, y, z))
    image.SetOrigin(tuple(float(v) for v in grid.matrix[:3, 3]))
    image.SetDirection(tuple(float(v) for v in (grid.matrix[:3, :3] / np.array([x, y, z])).ravel()))
    return image


def _to_image(volume: Volume) -> sitk.Image:
    return _place(sitk.GetImageFromArray(volume.array), volume.geometry)


def _empty_image(grid: Geometry) -> sitk.Image:
    slices, rows, columns = grid.shape
    return _place(sitk.Image([columns, rows, slices], sitk.sitkFloat32), grid)


def volumes_to_tensors(volumes: Mapping[str, Volume], protocol: Protocol) -> dict[str, npt.NDArray[np.float32]]:
    """The input tensors of the protocol's model from volumes that share the reference grid.

    Arrays are FP32 `(z, y, x)`; voxels outside a series' field of view are 0; `spacing` is `(z, y, x)` mm.
    An optional role without a series gives no tensor.
    """
    reference = volumes[protocol.measure.reference_role]
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for tensor in protocol.model.inputs:
        if tensor.role:
            if tensor.role in volumes:
                array = np.nan_to_num(volumes[tensor.role].array, nan=0.0)
                tensors[tensor.name] = np.ascontiguousarray(array, dtype=np.float32)
        else:
            tensors[tensor.name] = np.asarray(reference.geometry.spacing_mm, dtype=np.float32)
    return tensors
