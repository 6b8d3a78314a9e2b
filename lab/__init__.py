"""What measures and studies paci-megatron, from a checkout. The package knows nothing of it."""
