"""Imported by the server that workers are forked from: everything slow to import, with nothing left installed."""

import logging

import paci_megatron

# Megatron must be imported with the stand-ins for CUDA in place (paci_megatron/platform/cpu.py).
logging.disable(logging.INFO)  # the workers say again what is replaced
paci_megatron.install()
paci_megatron.uninstall()
logging.disable(logging.NOTSET)

import pretrain_gpt_paci  # noqa: E402, F401

from . import worker  # noqa: E402, F401
