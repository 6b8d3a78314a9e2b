"""Everything that is slow to import for a training, imported, with nothing of the plugin left installed.

For the server that ranks are forked from (``lab/workers.py``).
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import paci_megatron

# Megatron must be imported with the stand-ins for CUDA in place (paci_megatron/platform/cpu.py).
logging.disable(logging.INFO)  # the workers say again what is replaced
paci_megatron.install()
import megatron.core.tokenizers.text  # noqa: E402
import megatron.training.arguments  # noqa: E402
import megatron.training.training  # noqa: E402
from megatron.training.argument_utils import ArgumentGroupFactory  # noqa: E402

paci_megatron.uninstall()
logging.disable(logging.NOTSET)

import pretrain_gpt_paci  # noqa: E402, F401


def _remember_help_texts() -> None:
    """Megatron parses its own source for its options' help, twice a training: half the time of a small one. Once will do."""
    read = ArgumentGroupFactory._get_field_docstrings
    known: dict[type, dict[str, str]] = {}

    def remembered(self: Any, src_cfg_class: type) -> dict[str, str]:
        if src_cfg_class not in known:
            known[src_cfg_class] = read(self, src_cfg_class)
        return known[src_cfg_class]

    ArgumentGroupFactory._get_field_docstrings = remembered
    megatron.training.arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


_remember_help_texts()
