"""The Llama itself: float8 arrays, batches, the KV cache, layers, the model and sampling, as pure functions over pytrees.

Read it as llama -> layers -> kv_cache -> fp8. The room refuses to know where weights come from, who owns which page, how steps
are compiled and what a request is. It imports the vocabulary (config, recipe, mesh, sharding, errors) and pallas_kernels.
"""
