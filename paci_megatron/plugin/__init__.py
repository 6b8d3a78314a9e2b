"""The only place that knows Megatron's training loop: its names, its arguments, its globals."""
