"""The place of this process among several, before JAX starts: from flags, or from SLURM or Kubernetes. Imports no jax."""

import dataclasses
import importlib.util
import os

from jaxfp8.distributed.addresses import Address
from jaxfp8.distributed.tls import Tls
from jaxfp8.errors import InputError

AUTO = "auto"
# Variables that JAX's own detection needs (jax/_src/clusters), in a task of a SLURM step or a pod of an indexed Kubernetes job.
_SLURM = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"}
_KUBERNETES = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"}
_MAX_SECONDS = 86_400


@dataclasses.dataclass(frozen=True)
class ProcessPlace:
  """The user's flags for this process. None leaves a field to SLURM or Kubernetes, whose variables JAX reads.

  coordinator: HOST:PORT of process 0, or "auto". num_processes: at least 1. process_id: 0 .. num_processes - 1.
  heartbeat_seconds: at least 1. If a process is silent for longer, all processes end.
  start_seconds: at least 1. How long the processes wait for each other at the start.
  tls: certificates of the processes; None for connections that anybody may make.

  Raises InputError for values out of range, and for fields that do not belong together.
  """

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  heartbeat_seconds: int = 20
  start_seconds: int = 300
  tls: Tls | None = None

  def __post_init__(self):
    for name in ("heartbeat_seconds", "start_seconds"):
      if not 1 <= getattr(self, name) <= _MAX_SECONDS:
        raise InputError(f"hosts: --{name} must be from 1 to {_MAX_SECONDS}; got {getattr(self, name)}.")
    if self.coordinator not in (None, AUTO):
      Address.parse(self.coordinator)
      if self.num_processes is None or self.process_id is None:
        raise InputError("hosts: --coordinator=HOST:PORT needs --num_processes and --process_id. Pass all three, or auto.")
    elif self.process_id is not None or (self.num_processes or 1) > 1:
      raise InputError("hosts: --num_processes and --process_id belong to --coordinator=HOST:PORT. Pass all three.")
    if self.num_processes is not None and self.num_processes < 1:
      raise InputError(f"hosts: --num_processes must be at least 1; got {self.num_processes}.")
    count = self.num_processes or 1
    if self.process_id is not None and not 0 <= self.process_id < count:
      raise InputError(f"hosts: --process_id must be from 0 to {count - 1}; got {self.process_id}.")

  @property
  def is_one_of_many(self) -> bool:
    """Whether there are other processes, by the flags or as a task of a SLURM step or a pod of an indexed Kubernetes job."""
    if self.coordinator or self.num_processes:
      return bool(self.coordinator)
    if is_slurm_task():
      return slurm_tasks() > 1
    return os.environ.keys() >= _KUBERNETES

  def require_detection(self) -> None:
    """Raises InputError where JAX cannot find the other pods of a Kubernetes job for want of a package."""
    is_pod = "KUBERNETES_SERVICE_HOST" in os.environ and not is_slurm_task()
    if self.coordinator in (None, AUTO) and is_pod and importlib.util.find_spec("kubernetes") is None:
      raise InputError(
        "hosts: this is a pod of Kubernetes, and JAX needs the package kubernetes to find the others. Install it (pip install "
        "kubernetes), or pass --coordinator, --num_processes and --process_id; --num_processes 1 if there are no others."
      )


def is_slurm_task() -> bool:
  """Whether this process is a task of a SLURM step, by all the variables that JAX reads."""
  return os.environ.keys() >= _SLURM


def slurm_tasks() -> int:
  """The number of tasks of this step, or of the job where SLURM says no more. Raises InputError if that is no number."""
  name = "SLURM_STEP_NUM_TASKS" if os.environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
  try:
    return int(os.environ[name])
  except ValueError as error:
    raise InputError(
      f"hosts: SLURM's variable {name} must be a number; got {os.environ[name]!r}. Pass --num_processes 1 if there are no "
      "other processes."
    ) from error
