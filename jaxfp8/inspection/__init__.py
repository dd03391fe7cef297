"""Facts about a compiled program: compilation for GPUs that are absent, the instructions of its HLO, and the bytes it moves.

The room refuses to know engines, requests and what kernels compute; nothing in it has run on a device. It imports the
vocabulary, planning (for DeviceSpec) and pallas_kernels.
"""
