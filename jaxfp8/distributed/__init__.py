"""Distributed: several processes that run one program.

environment.py identifies this process from flags, SLURM or Kubernetes, without jax. processes.py connects it to the others over
JAX's coordinator. The room refuses to know models and requests. It may import only the vocabulary.
"""
