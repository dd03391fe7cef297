"""Planning: whether a deployment fits, how fast it can be, and what bounds it, from sizes and a device's data sheet alone.

The room loads no jax, reads no weights and measures no GPU; compile_request.py asks a child process for compiled programs.
It may import only the vocabulary: config, recipe, mesh, units, errors and plots.
"""
