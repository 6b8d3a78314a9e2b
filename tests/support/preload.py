"""Imported by the server that the pool's workers are forked from: everything slow to import."""

import paci_megatron

# Megatron must be imported with the stand-ins for CUDA in place (paci_megatron/platform/cpu.py).
paci_megatron.install()
import megatron.core.tokenizers.text  # noqa: E402
import megatron.training.training  # noqa: E402, F401

paci_megatron.uninstall()

import pretrain_gpt_paci  # noqa: E402, F401

from . import jobs  # noqa: E402, F401
