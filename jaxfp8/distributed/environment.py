"""The place of this process among several, before JAX starts: from flags, or from SLURM or Kubernetes. Imports no jax."""

import dataclasses
import os

from jaxfp8.errors import InputError

AUTO = "auto"
# Variables that JAX's own detection needs (jax/_src/clusters), in a task of a SLURM step or a pod of an indexed Kubernetes job.
_SLURM = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"}
_KUBERNETES = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"}


@dataclasses.dataclass(frozen=True)
class ProcessPlace:
  """The user's flags for this process. None leaves a field to SLURM or Kubernetes, whose variables JAX reads.

  coordinator: HOST:PORT of process 0, or "auto". num_processes: at least 1. process_id: 0 .. num_processes - 1.
  heartbeat_seconds: at least 1. If a process is silent for longer, all processes end.

  Raises InputError for values out of range, and for fields that do not belong together.
  """

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  heartbeat_seconds: int = 20

  def __post_init__(self):
    if self.heartbeat_seconds < 1:
      raise InputError(f"hosts: --heartbeat_seconds must be at least 1; got {self.heartbeat_seconds}.")
    if self.coordinator not in (None, AUTO):
      _, colon, port = self.coordinator.rpartition(":")
      if not (colon and port.isdigit() and 0 < int(port) < 65536):
        raise InputError(f"hosts: --coordinator must be HOST:PORT of process 0, or auto; got {self.coordinator!r}.")
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
    if os.environ.keys() >= _SLURM:
      return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ["SLURM_NTASKS"]) > 1
    return os.environ.keys() >= _KUBERNETES
