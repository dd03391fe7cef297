"""Distributed: several processes that run one program.

environment.py and detection.py tell the place of this process from flags, SLURM or Kubernetes. meeting.py brings the processes
together, and tells each when another one ends. processes.py connects them over JAX's coordinator. The room refuses to know
models and requests. It may import only the vocabulary.
"""
