"""Quantization: scales and rounding chosen from text, and the quality that a recipe costs.

Calibration observes activations and writes static scales; rounding.py is GPTQ; quality.py measures perplexity and KL, and
quality_gate.py judges them. The room refuses to know requests and flags. It may import planning, model, inspection, checkpoint
and text.
"""
