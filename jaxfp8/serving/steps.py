"""The steps: `prefill` and `decode` as pure functions, and `CompiledSteps`, which compiles them ahead of time.

    logits_BV, cache = prefill(model, cache, batch)     # a researcher's loop
    state, sampled = steps.run(state, inputs)           # the engine's loop: sampling is fused in, state is donated

A compiled step is jit(shard_map(step)) over the mesh ("data", "kv", "group"), even if all its axes are 1. There is one program
for each kind and size of batch. The tokens that a step chooses stay on the device, in `State.last_tokens`, so that the next
step can start before the host has read them. `sampled` is replicated: each device has the tokens of all data shards.
Refuses to know requests, text and the owners of pages.
"""

import dataclasses
import functools
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfp8 import private_files, stored_files
from jaxfp8.errors import InputError
from jaxfp8.model.batch import DecodeBatch, PrefillBatch
from jaxfp8.model.kv_cache import KVCache
from jaxfp8.model.llama import Llama
from jaxfp8.model.sampling import Sampled, SamplingBatch, sample
from jaxfp8.serving import program_cache
from jaxfp8.serving.limits import EngineLimits, StepKind
from jaxfp8.sharding import DATA, TENSOR, abstract_array, concatenate_over, mesh_shape
from pallas_kernels import Target, conformance, debug, float8_bytes

# With these command types a layer, all-reduces included, is one CUDA graph. XLA's default cuts at every collective and loop.
GPU_OPTIONS = {
  "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,COLLECTIVES,WHILE,CONDITIONAL,DYNAMIC_SLICE_FUSION"
}
FROM_DEVICE = -1  # in tokens_T: the step takes the token from `State.last_tokens`


def prefill(model: Llama, cache: KVCache, batch: PrefillBatch) -> tuple[jax.Array, KVCache]:
  """Runs ragged prompts. Returns float32 logits [B, V], after each sequence's last token, and the updated cache."""
  hidden_TD, cache = model(batch, cache)
  with jax.named_scope("last_tokens"):
    last_BD = hidden_TD[batch.last_tokens()]
  return model.logits(last_BD), cache


def decode(model: Llama, cache: KVCache, batch: DecodeBatch) -> tuple[jax.Array, KVCache]:
  """Runs one token of each sequence. Returns float32 logits [B, V] and the updated cache."""
  hidden_TD, cache = model(batch, cache)
  return model.logits(hidden_TD), cache


@flax.struct.dataclass
class State:
  """The arrays that stay on the devices from step to step. On a CPU float8 pages are bytes (pallas_kernels/float8_bytes.py).

  last_tokens: int32 [data * slots], the token last chosen for the sequence in each slot.
  history: int32 [data * slots, max_pages * page_size], the tokens of the sequence in each slot, for penalties.
  """

  cache: KVCache
  last_tokens: jax.Array
  history: jax.Array


@flax.struct.dataclass
class StepInput:
  """One step's batch and its sampling options, over all data shards.

  slot_B: int32, each sequence's row of last_tokens and history on its data shard; out of range for an empty row.
  emit_B: bool, whether the chosen token is the sequence's next token (false in the middle of a prompt).
  """

  batch: PrefillBatch | DecodeBatch
  slot_B: jax.Array
  emit_B: jax.Array
  sampling: SamplingBatch


class CompiledSteps:
  """The programs of one model on one mesh. Holds the weights; the arrays that steps change are in `State`.

  Raises InputError if the model was loaded for another mesh.
  """

  def __init__(self, model: Llama, mesh: Mesh, limits: EngineLimits):
    if mesh_shape(mesh) != dataclasses.replace(model.shape, data=mesh.shape[DATA]):
      raise InputError(f"steps: the model was loaded for {model.shape}; the mesh is {mesh_shape(mesh)}. Load it for this mesh.")
    self.limits, self.mesh, self.config = limits, mesh, model.config
    self.kv = model.recipe.kv
    self.compile_seconds = 0.0
    self._graph, self._tree, weights, self._specs = _split_for_mesh(model, mesh)
    self._target = Target.of(mesh.devices.flat[0])
    self._weights = float8_bytes.arguments(weights, self._target)
    self._kernels = model.runtime.implementation not in ("xla", "reference")
    self._programs: dict[tuple[str, int], jax.stages.Compiled] = {}
    self._identity = repr((model.config, model.recipe, model.formats, model.shape, model.runtime, mesh_shape(mesh), limits))

  @property
  def num_shards(self) -> int:
    return self.mesh.shape[DATA]

  def init_state(self) -> State:
    """A `State` on the devices, with an empty pool and no tokens."""
    return jax.jit(float8_bytes.program(self._empty_state, self._target), out_shardings=self._shardings(self._state_specs()))()

  def compile(self, kind: str, size: int) -> jax.stages.Compiled:
    """The program for "prefill" with `size` tokens or "decode" with `size` sequences per data shard, compiled once.

    On the first use of a GPU its kernels are compared with plain XLA. Raises InputError if they differ.
    """
    if (kind, size) not in self._programs:
      start = time.perf_counter()
      self._require_kernels()
      key = f"{kind} {size} {self._identity}"
      program = program_cache.load(key, self.mesh)
      if program is None:
        with debug.unchecked():  # `run` checks the values before it calls the program
          program = self.build(self.lower(kind, size))
        program_cache.store(key, program, self.mesh)
      self._programs[kind, size] = program
      self.compile_seconds += time.perf_counter() - start
    return self._programs[kind, size]

  def build(self, lowered: jax.stages.Lowered, **options: str) -> jax.stages.Compiled:
    """Compiles with the options of the mesh's platform. `options` adds XLA options, such as xla_dump_to."""
    return lowered.compile(compiler_options={**({} if self._target.platform == "cpu" else GPU_OPTIONS), **options} or None)

  def _require_kernels(self) -> None:
    if self._kernels:
      local = [device for device in self.mesh.devices.flat if device.process_index == jax.process_index()]
      try:
        folder = jax.config.jax_compilation_cache_dir or ""
        conformance.require(local[0], folder, read=stored_files.read_own, write=private_files.write_bytes)
      except conformance.KernelError as error:
        raise InputError(str(error)) from error

  def lower(self, kind: str, size: int) -> jax.stages.Lowered:
    """The step of this kind and size, traced and lowered. Needs no arrays."""
    step, args = self.traceable(kind, size)
    return step.lower(*args)

  def traceable(self, kind: str, size: int) -> tuple[jax.stages.Wrapped, tuple]:
    """The step under jit, before tracing, and its abstract arguments: weights, state (donated), inputs."""
    inputs = self.abstract_inputs(kind, size)
    state = self.abstract_state()
    input_specs = jax.tree.map(lambda _: PartitionSpec(DATA), inputs)
    step = functools.partial(_step, self._graph, self._tree, self.config.vocab_size, self.limits.num_logprobs)
    step = jax.shard_map(
      float8_bytes.program(step, self._target),
      mesh=self.mesh,
      in_specs=(self._specs, self._state_specs(), input_specs),
      out_specs=(self._state_specs(), PartitionSpec()),
      check_vma=False,
    )
    weights = tuple(jax.ShapeDtypeStruct(w.shape, w.dtype) for w in self._weights)
    args = tuple(
      jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings)
      for tree, shardings in (
        (weights, self._shardings(self._specs)),
        (state, self._shardings(self._state_specs())),
        (inputs, self._shardings(input_specs)),
      )
    )
    return jax.jit(step, donate_argnums=1), args

  def run(self, state: State, inputs: StepInput) -> tuple[State, Sampled]:
    """Starts one step and returns without waiting for its results. Donates `state`.

    Under `pallas_kernels.debug_checks`, raises ValueError for impossible pages, lengths or query starts.
    """
    if debug.checking():
      self._check(inputs.batch)
    kind = StepKind.PREFILL if isinstance(inputs.batch, PrefillBatch) else StepKind.DECODE
    return self.compile(kind, inputs.batch.tokens_T.shape[0] // self.num_shards)(self._weights, state, inputs)

  def _check(self, batch: PrefillBatch | DecodeBatch) -> None:
    sizes = {"num_pages": self.limits.num_pages, "page_size": self.limits.page_size}

    def cut(array):
      return [None] * self.num_shards if array is None else np.split(np.asarray(array), self.num_shards)

    for arrays in zip(*map(cut, (batch.page_table_BM, batch.lengths_B, batch.query_starts)), strict=True):
      num_tokens = batch.tokens_T.shape[0] // self.num_shards
      debug.require_pages(type(batch).__name__, *arrays, num_tokens=num_tokens, **sizes)

  def abstract_inputs(self, kind: str, size: int) -> StepInput:
    """The shapes and dtypes of a step's inputs, over all data shards."""
    shards, rows = self.num_shards, self.limits.max_sequences if kind == StepKind.PREFILL else size
    ints = functools.partial(abstract_array, dtype=jnp.int32)
    floats = functools.partial(abstract_array, dtype=jnp.float32)
    tokens, lengths = ints((shards * size,)), ints((shards * rows,))
    table = ints((shards * rows, self.limits.max_pages))
    if kind == StepKind.PREFILL:
      batch = PrefillBatch(tokens, ints((shards * (rows + 1),)), lengths, table)
    else:
      batch = DecodeBatch(tokens, lengths, table)
    B = (shards * rows,)
    seeds = abstract_array((*B, 2), jnp.uint32)
    sampling = SamplingBatch(floats(B), ints(B), floats(B), floats(B), seeds, floats(B), floats(B), floats(B), ints(B))
    return StepInput(batch, ints(B), abstract_array(B, jnp.bool_), sampling)

  @property
  def num_weights(self) -> int:
    """The number of weight arrays, which are the first arguments of a program."""
    return len(self._weights)

  def abstract_state(self) -> State:
    """The shapes and dtypes of the state, over all data shards."""
    return jax.eval_shape(float8_bytes.program(self._empty_state, self._target))

  def _empty_state(self) -> State:
    limits = self.limits
    cache = KVCache.init(self.config, limits.num_pages * self.num_shards, self.kv, limits.page_size)
    num_slots = limits.max_sequences * self.num_shards
    history = jnp.zeros((num_slots, limits.max_pages * limits.page_size), jnp.int32)
    return State(cache, jnp.zeros(num_slots, jnp.int32), history)

  def _state_specs(self) -> State:
    cache = KVCache.abstract(self.config, self.limits.num_pages, self.kv, self.limits.page_size)
    per_shard: Any = PartitionSpec(DATA)  # typed as Any: the fields of this State hold partition specs
    return State(cache.specs(), per_shard, per_shard)

  def _shardings(self, specs):
    return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _split_for_mesh(model: Llama, mesh: Mesh):
  """(graph, tree, weights, specs): the model as a flat tuple of arrays for shard_map. `_step` merges them while tracing."""
  twin = Llama(
    model.config,
    model.recipe,
    formats=model.formats,
    shape=model.shape,
    axes=TENSOR,
    implementation=model.runtime.implementation,
    target=Target.of(mesh.devices.flat[0]),
  )
  graph, abstract = nnx.split(twin)
  weights = jax.tree.leaves(nnx.state(model))
  if jax.tree.structure(abstract).num_leaves != len(weights):
    raise InputError("steps: the model's weights are not those of its config. Load it again.")
  return graph, jax.tree.structure(abstract), tuple(weights), tuple(twin.partitions())


def _step(graph, tree, vocab_size, num_logprobs, weights, state, inputs: StepInput) -> tuple[State, Sampled]:
  """The computation of one device: take tokens from the device, run the model, record the history, sample."""
  model = nnx.merge(graph, jax.tree.unflatten(tree, weights))
  batch = inputs.batch
  with jax.named_scope("tokens"):
    sequence_T, position_T = batch.token_positions()
    on_device = jnp.take(state.last_tokens, inputs.slot_B[sequence_T], mode="clip")
    batch = batch.replace(tokens_T=jnp.where(batch.tokens_T == FROM_DEVICE, on_device, batch.tokens_T))
  if isinstance(batch, PrefillBatch):
    logits, cache = prefill(model, state.cache, batch)
  else:
    logits, cache = decode(model, state.cache, batch)
  with jax.named_scope("history"):
    history = state.history
    position_T = jnp.where(position_T < 0, history.shape[1], position_T)  # padding; a negative index would count from the end
    history = history.at[inputs.slot_B[sequence_T], position_T].set(batch.tokens_T, mode="drop")
  sampled = sample(
    logits,
    inputs.sampling,
    batch.lengths_B,
    vocab_size=vocab_size,
    axes=TENSOR,
    num_logprobs=num_logprobs,
    history_BS=lambda: jnp.take(history, inputs.slot_B, axis=0, mode="clip"),
  )
  with jax.named_scope("results"):
    slot_B = jnp.where(inputs.emit_B, inputs.slot_B, state.last_tokens.shape[0])
    last_tokens = state.last_tokens.at[slot_B].set(sampled.tokens_B, mode="drop")
    sampled = jax.tree.map(lambda x: concatenate_over(x, (DATA,)), sampled)  # replicated on every device, in every process
  return State(cache, last_tokens, history), sampled
