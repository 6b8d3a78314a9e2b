"""What a schedule costs: time, memory, drift, by simulation. Pure Python: no torch, no megatron."""
