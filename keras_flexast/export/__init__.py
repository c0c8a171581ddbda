"""Export: a run as files that a server, a phone or another runtime can use."""

from keras_flexast.export.common import FixedOptions
from keras_flexast.export.folder import export_run
from keras_flexast.export.onnx import write_onnx
from keras_flexast.export.serving import write_serving
from keras_flexast.export.tflite import write_multi_tflite, write_tflite

__all__ = [
    "FixedOptions",
    "export_run",
    "write_multi_tflite",
    "write_onnx",
    "write_serving",
    "write_tflite",
]
