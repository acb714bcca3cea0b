"""Serves algorithm.py as a Triton python model. Reference for wiring only, not for clinical use."""

import numpy_bridge
import triton_python_backend_utils as pb_utils
from algorithm import UnusableInput, read_prostate

INPUTS = ("t2w", "adc", "hbv", "spacing")
OUTPUTS = ("gland", "zones", "lesions", "scores")


class TritonPythonModel:
    """One answer a request; what cannot be read is answered with an error that names the tensor."""

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        arrays = [numpy_bridge.to_numpy(request, name).astype("float64") for name in INPUTS]
        try:
            answer = read_prostate(*arrays)
        except UnusableInput as error:
            refusal = pb_utils.TritonError(f"prostate_reference: {error}", pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=refusal)
        tensors = [numpy_bridge.to_tensor(name, getattr(answer, name)) for name in OUTPUTS]
        return pb_utils.InferenceResponse(output_tensors=tensors)
