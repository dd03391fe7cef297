"""Trains a tiny model on one line of tokens with plain gradient descent: `uv run python examples/gradients.py`.

Kernels have no derivative; `implementation="reference"` has one. The model is a pytree, so `jax.grad` returns a model of
gradients.
"""

import jax
import jax.numpy as jnp

import jaxfp8

config = jaxfp8.LlamaConfig.from_name("tiny")
recipe = jaxfp8.Recipe(weights="bf16", activations="bf16", kv="bf16")
model = jaxfp8.random_weights(jaxfp8.Llama(config, recipe, implementation="reference"), jax.random.key(0))
TOKENS = (17, 3, 99, 4, 17, 3, 99, 4)


def loss(model: jaxfp8.Llama) -> jax.Array:
  """Mean negative log-likelihood of every token of TOKENS but the first."""
  batch = jaxfp8.PrefillBatch.from_prompts([TOKENS[:-1]])
  hidden_TD, _ = model(batch, jaxfp8.KVCache.init(config, num_pages=1))
  logprobs_TV = jax.nn.log_softmax(model.logits(hidden_TD))
  return -jnp.take_along_axis(logprobs_TV, jnp.array(TOKENS[1:])[:, None], axis=1).mean()


@jax.jit
def step(model: jaxfp8.Llama) -> tuple[jaxfp8.Llama, jax.Array]:
  value, gradients = jax.value_and_grad(loss)(model)
  return jax.tree.map(lambda weight, gradient: (weight - 0.1 * gradient).astype(weight.dtype), model, gradients), value


for index in range(6):
  model, value = step(model)
  print(f"step {index}: loss {value:.3f}")
