"""One process of several, as a researcher would write it: an Engine over meshes that span processes. Started by test_hosts.py.

    python tests/helpers/hosts_worker.py PORT PROCESS FOLDER

Prints one line of JSON: the tokens of each mesh, and what is said where processes ask for different things.
"""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
PORT, PROCESS, FOLDER = sys.argv[1], int(sys.argv[2]), sys.argv[3]

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{PORT}", 2, PROCESS, cluster_detection_method="deactivate", heartbeat_timeout_seconds=20)

from flax import nnx  # noqa: E402

import jaxfp8  # noqa: E402
from jaxfp8.checkpoint.open import Checkpoint  # noqa: E402
from jaxfp8.serving import memory  # noqa: E402
from tests.distributed import test_processes as test_hosts  # noqa: E402

result = {"devices": len(jax.devices())}
for name, (tensor, data) in test_hosts.MESHES.items():
  mesh = jaxfp8.make_mesh(test_hosts.CONFIG, tensor=tensor, data=data)
  model = jaxfp8.load(FOLDER, mesh=mesh)
  engine = jaxfp8.Engine(model, mesh=mesh, limits=test_hosts.LIMITS)
  result[name] = [completion.token_ids for completion in engine.generate(test_hosts.requests())]
  result[f"processes of {name}"] = [device.process_index for device in mesh.devices.flat]
  result[f"local bytes of {name}"] = sum(
    shard.data.nbytes for leaf in jax.tree.leaves(engine.steps._weights) for shard in leaf.addressable_shards
  )
read, asked = Checkpoint.read_ranges, []
Checkpoint.read_ranges = lambda self, ranges: asked.extend(done := read(self, ranges)) or done
wide = jaxfp8.load(FOLDER, mesh=jaxfp8.make_mesh(test_hosts.CONFIG, tensor=8))
result["rows and columns of tensor 8"] = sum(r.stop - r.start for r in asked)
result["local bytes of tensor 8"] = sum(
  shard.data.nbytes for leaf in jax.tree.leaves(nnx.state(wide)) for shard in leaf.addressable_shards
)
for name, ask in {
  "uneven": lambda: jaxfp8.make_mesh(test_hosts.CONFIG, tensor=1),
  "too many": lambda: jaxfp8.make_mesh(test_hosts.CONFIG, tensor=8, data=2),
  "other requests": lambda: engine.generate(test_hosts.requests()[PROCESS:]),
}.items():
  try:
    ask()
    result[name] = "nothing"
  except jaxfp8.InputError as error:
    result[name] = str(error)
memory.free_bytes = lambda device: 1000 + PROCESS
result["least"] = memory.least_free_bytes(mesh)
print("\n" + json.dumps(result), flush=True)
