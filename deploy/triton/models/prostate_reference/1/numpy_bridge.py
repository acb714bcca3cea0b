"""Moves tensors between Triton's python backend and numpy, whatever numpy is installed.

Stubs built before numpy 2 read numpy's descriptors at numpy 1's offsets: `as_numpy()` then gives
the first value repeated, and `Tensor(name, array)` an empty output, both without an error (seen with server
2.51 and numpy 2.4). DLPack does not depend on that layout and works with either.
"""

import ctypes
import os
import sys

if os.environ.get("WETREAD_SITE_PACKAGES"):
    # The bundled launcher's stub runs the system's Python, which knows no virtual environment.
    sys.path.append(os.environ["WETREAD_SITE_PACKAGES"])

import numpy as np
import triton_python_backend_utils as pb_utils

_CONSUMED = b"used_dltensor"


def to_numpy(request, name):
    """The request's tensor as a read-only array on Triton's own memory, valid while the request is."""
    return np.from_dlpack(pb_utils.get_input_tensor_by_name(request, name))


def to_tensor(name, array):
    """A Triton tensor with a copy of the array's values."""
    array = np.ascontiguousarray(array)
    if array.size == 0:
        return pb_utils.Tensor(name, array)  # from_dlpack refuses size zero as "not contiguous"
    capsule = array.__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    # The stub marks the capsule with a name that numpy's destructor does not know and complains about.
    ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), _CONSUMED)
    return tensor
