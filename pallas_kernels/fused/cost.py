"""What one call of each fused kernel moves and computes, from the shapes of its arguments and results."""

from pallas_kernels.costs import Cost, bytes_of


def residual_norm(x_TD, y_TD, weight_D, outputs) -> Cost:
  return Cost(bytes_of(weight_D), read_bytes=bytes_of(x_TD, y_TD), written_bytes=bytes_of(*outputs), flops=8 * x_TD.size)


def silu_multiply(sums, outputs) -> Cost:
  """sums: fp8_matmul's PartialSums. The scales of rows are weights, read here where the product left them."""
  read = bytes_of(sums.splits_STF, sums.x_scale)
  return Cost(bytes_of(sums.w_scale), read_bytes=read, written_bytes=bytes_of(*outputs), flops=10 * outputs[0].size)


def rope_write(sums, cos_TH, sin_TH, pages, q_TNH) -> Cost:
  """Every token present. A token's key and value go to one place of each pool and head."""
  T, N, H = q_TNH.shape
  K = pages[0].shape[1]
  a_head = 2 * H * pages[0].dtype.itemsize + (2 * pages[2].dtype.itemsize if len(pages) == 4 else 0)
  return Cost(
    bytes_of(sums.w_scale),
    kv_written_bytes=T * K * a_head,
    read_bytes=bytes_of(sums.splits_STF, sums.x_scale, cos_TH, sin_TH),
    written_bytes=bytes_of(q_TNH),
    flops=6 * T * (N + K) * H,
  )
