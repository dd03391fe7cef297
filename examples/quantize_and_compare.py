"""Quantizes one matrix with each granularity and compares the errors: `uv run python examples/quantize_and_compare.py`.

A float8_e4m3 value has 3 bits of mantissa, so an ordinary weight is off by 2 % whatever its scale. One large outlier makes
the scale of its whole row, block or matrix larger, and small weights under that scale lose bits.
"""

import jax
import jax.numpy as jnp

import jaxfp8

weight_FD = 0.02 * jax.random.normal(jax.random.key(0), (512, 512))
weight_FD = weight_FD.at[3, 5].set(2000.0)  # one outlier

for granularity in ("tensor", "channel", "block128"):
  quantized = jaxfp8.quantize(weight_FD, granularity)
  error_FD = jnp.abs(jaxfp8.dequantize(quantized) - weight_FD) / jnp.abs(weight_FD)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))
  median, of_row = jnp.median(error_FD), jnp.median(error_FD[3])
  print(f"{granularity:9} median error {median:.2%}, of the outlier's row {of_row:.2%}, {size:,} bytes")
