"""Attention of ragged queries over a paged KV cache."""
