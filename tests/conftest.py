"""Set before TensorFlow is imported."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Most of the time goes into compiling programs that run once.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
