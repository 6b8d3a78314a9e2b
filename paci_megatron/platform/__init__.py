"""Megatron on machines it does not expect: without CUDA, without Transformer Engine or Apex, several ranks on a GPU."""
