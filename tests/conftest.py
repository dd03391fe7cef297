"""Tests run on eight CPU devices, whatever else is here; GPU programs are compiled in subprocesses of their own."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads spin: on shared cores numpy takes five times as long
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
