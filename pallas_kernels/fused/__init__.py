"""The small operations between a layer's products, each one kernel where there are kernels; see api.py."""
