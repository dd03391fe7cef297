"""The devices that JAX computes on: chosen before jax is imported, and the variables of a user that JAX or XLA cannot take.

    choose_platform()     before jax is imported
    check_xla_flags()     before jax is imported
    explain(error)        when a command has failed

XLA aborts the process over a flag that it does not know, so XLA_FLAGS is tried in a child process first. Loads no jax.
"""

import logging
import os
import pathlib
import re
import subprocess
import sys
import traceback

from jaxfp8.errors import InputError

_CPU_DEVICES = re.compile(r"\s*(--xla_force_host_platform_device_count=[0-9]+\s*)*")  # needs no trial
_TRIAL = "from jaxlib import xla_client; xla_client.make_cpu_client()"
_TRIAL_SECONDS = 60
_NO_GPU = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES


def choose_platform() -> None:
  """Sets JAX_PLATFORMS=cpu where no NVIDIA GPU is visible, unless JAX_PLATFORMS is set and not empty."""
  driver = any(pathlib.Path("/dev").glob("nvidia[0-9]*")) or any(
    pathlib.Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/dxg", "/dev/nvhost-gpu")
  )
  hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in _NO_GPU
  asked = os.environ.get("JAX_PLATFORMS", "").strip()
  if asked:
    os.environ["JAX_PLATFORMS"] = asked
    # It logs the traceback of a platform that it cannot start, and then raises the error that `explain` puts into words.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL + 1)
  elif hidden or not driver:
    os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def check_xla_flags() -> None:
  """Raises InputError if XLA refuses the variable XLA_FLAGS."""
  value = os.environ.get("XLA_FLAGS", "")
  if _CPU_DEVICES.fullmatch(value):
    return
  try:
    ended = subprocess.run(
      [sys.executable, "-P", "-c", _TRIAL], stdin=subprocess.DEVNULL, capture_output=True, timeout=_TRIAL_SECONDS, check=False
    )
  except (OSError, subprocess.SubprocessError):
    return
  match = re.search(r"^[EF]\d.*?\] (.*)$", ended.stderr.decode(errors="replace"), re.MULTILINE)
  if ended.returncode and match:
    reason = match[1][:300].rstrip(". ")
    raise InputError(f"devices: XLA refuses XLA_FLAGS={value[:200]!r}: {reason}. Correct the variable, or unset it.")


def explain(error: BaseException) -> str:
  """One sentence for an error of JAX about the devices that it was asked for; empty for another error."""
  frames = traceback.extract_tb(error.__traceback__)
  if not frames or not frames[-1].filename.endswith(os.path.join("jax", "_src", "xla_bridge.py")):
    return ""
  asked = os.environ.get("JAX_PLATFORMS", "")
  reason = " ".join(str(error).split())
  reason = re.sub(r"^Unable to initialize backend '[^']*': |\s*\((you may need to|set JAX_PLATFORMS).*$", "", reason)
  detail = f" ({reason[:300].rstrip('. ')})" if reason else ""
  way_out = "Unset JAX_PLATFORMS, or set JAX_PLATFORMS=cpu."
  return f"devices: JAX_PLATFORMS={asked} names devices that are not here{detail}. {way_out}"
