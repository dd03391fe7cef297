"""A process and its place among others, before JAX starts: by flags, or by SLURM and Kubernetes. Imports no jax."""

import dataclasses
import os

from jaxfp8.errors import InputError

AUTO = "auto"
# What JAX's own detection needs (jax/_src/clusters): a task of a SLURM step, a pod of an indexed Kubernetes job.
_SLURM = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"}
_KUBERNETES = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"}


@dataclasses.dataclass(frozen=True)
class ProcessPlace:
  """What a user says of this process; None leaves it to SLURM or Kubernetes, whose words JAX reads.

  coordinator: HOST:PORT of process 0, or "auto". heartbeat_seconds: how long a process may be silent before all end.
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
    """Whether there are other processes: flags say so, or this is a task of a SLURM step or of an indexed Kubernetes job."""
    if self.coordinator or self.num_processes:
      return bool(self.coordinator)
    if os.environ.keys() >= _SLURM:
      return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ["SLURM_NTASKS"]) > 1
    return os.environ.keys() >= _KUBERNETES
