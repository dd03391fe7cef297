"""A decoding loop of your own over the pure functions `prefill` and `decode`: `uv run python examples/decode_loop.py`.

Weights, KV cache and batch are arguments; logits and the new cache are results. The model has random weights, so the
tokens mean nothing. The last line compares the loop's logits with those of one prefill of all tokens.
"""

import jax
import jax.numpy as jnp

import jaxfp8

config = jaxfp8.LlamaConfig.from_name("tiny")
model = jaxfp8.random_weights(jaxfp8.Llama(config, jaxfp8.Recipe(weights="fp8")), jax.random.key(0))
prompts = [[5, 17, 200, 3], [42, 7]]

# Donating the cache lets XLA write the pages in place.
prefill = jax.jit(jaxfp8.prefill, donate_argnums=1)
decode = jax.jit(jaxfp8.decode, donate_argnums=1)

batch = jaxfp8.PrefillBatch.from_prompts(prompts)  # gives each prompt a page of its own
logits_BV, cache = prefill(model, jaxfp8.KVCache.init(config, num_pages=2), batch)
lengths_B, tokens = batch.lengths_B, [list(prompt) for prompt in prompts]
for _ in range(6):
  next_B = logits_BV.argmax(axis=-1)
  for sequence, token in zip(tokens, next_B.tolist(), strict=True):
    sequence.append(token)
  lengths_B = lengths_B + 1
  logits_BV, cache = decode(model, cache, jaxfp8.DecodeBatch(next_B, lengths_B, batch.page_table_BM))

whole = jaxfp8.PrefillBatch.from_prompts(tokens)
expected_BV, _ = prefill(model, jaxfp8.KVCache.init(config, num_pages=2), whole)
print(f"tokens {tokens}")
print(f"largest difference from one prefill: {jnp.abs(logits_BV - expected_BV).max():.3g}")
