"""Serving: requests in, text out.

The scheduler plans steps in Python ints (pages, scheduler, limits: no jax), steps.py compiles and runs them, the engine joins
the two, and startup.py turns a path and options into a loaded model. The room refuses to know flags and file formats. It may
import every room above it in DESIGN's order: planning, model, inspection, checkpoint, text, quantization and distributed.
"""
