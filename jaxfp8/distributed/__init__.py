"""Distributed: several processes that run one program.

environment.py reads who this process is (flags, SLURM, Kubernetes) without jax; processes.py meets the others over JAX's
coordinator. The room refuses to know models and requests. It may import only the vocabulary.
"""
