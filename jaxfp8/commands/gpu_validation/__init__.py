"""commands/gpu_validation."""
