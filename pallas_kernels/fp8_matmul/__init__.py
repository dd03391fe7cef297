"""x @ w^T with float8 (or plain) weights and float32 scales."""
