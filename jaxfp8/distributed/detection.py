"""The place of this process by what JAX detects: SLURM, Kubernetes, MPI and others."""

import dataclasses
import os
from typing import Any

from jax._src import clusters

from jaxfp8.distributed import environment
from jaxfp8.distributed.environment import AUTO, ProcessPlace
from jaxfp8.errors import InputError, first_line


def detect(place: ProcessPlace) -> tuple[ProcessPlace, Any]:
  """The place with what JAX finds out about SLURM, Kubernetes and others, and the numbers of its devices, or None.

  Raises InputError where nothing says where this process belongs.
  """
  if place.coordinator not in (None, AUTO):
    return place, None
  place.require_detection()
  try:
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    address, count, index, device_ids = detect(
      os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, place.start_seconds
    )
  except Exception as error:  # of SLURM's and Kubernetes' many
    reason = f" ({first_line(error)})"
    address = count = index = device_ids = None
  else:
    reason = ""
  if address is None or count is None or index is None:
    raise InputError(
      f"hosts: neither SLURM nor Kubernetes says where this process belongs{reason}. Pass --coordinator=HOST:PORT, "
      "--num_processes and --process_id."
    )
  if environment.is_slurm_task():
    count = environment.slurm_tasks()  # JAX takes the whole job's
  found = {"coordinator": address, "num_processes": count, "process_id": index}
  return dataclasses.replace(place, **found), device_ids
