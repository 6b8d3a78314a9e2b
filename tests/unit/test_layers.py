"""Where layers do not fit the stages, the flags that are named make them fit."""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest

from paci_megatron.config import ConfigError
from paci_megatron.plugin.layers import check_layers


def namespace(num_layers: int, num_stages: int, **changes: Any) -> argparse.Namespace:
    """The arguments that say which layers are on which stage."""
    values = {
        "pipeline_model_parallel_size": num_stages,
        "paci_emulate_stages": None,
        "pipeline_model_parallel_layout": None,
    }
    return argparse.Namespace(**{**values, "num_layers": num_layers, **changes})


def refusal(args: argparse.Namespace) -> str:
    """Of a command line; empty if there is none."""
    try:
        check_layers(args)
    except ConfigError as error:
        return str(error)
    return ""


def test_seven_layers_on_four_stages() -> None:
    for args in (namespace(7, 4), namespace(7, 1, paci_emulate_stages=4)):
        assert refusal(args) == (
            "--num-layers 7 on 4 stages: the layers do not spread evenly over the stages. Give "
            "--decoder-first-pipeline-num-layers 1, or --pipeline-model-parallel-layout 'Et|tt|tt|ttL'."
        )


@pytest.mark.parametrize("num_stages", range(1, 10))
def test_what_is_named_fits_and_what_fits_is_not_refused(num_stages: int) -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    for num_layers in range(1, 31):
        message = refusal(namespace(num_layers, num_stages))
        assert bool(message) == (num_layers % num_stages != 0)
        if message and num_layers < num_stages:
            assert message.endswith(f"Use at most {num_layers} stages.")
        elif message:
            (layout,) = re.findall(r"layout '(\S+)'", message)
            stages = PipelineParallelLayerLayout.parse_str_to_list(layout)
            counts = [str(stage).count("decoder") for stage in stages]
            assert len(counts) == num_stages and sum(counts) == num_layers and max(counts) - min(counts) == 1
            assert refusal(namespace(num_layers, num_stages, pipeline_model_parallel_layout=layout)) == ""
            for first in re.findall(r"first-pipeline-num-layers (\d+)", message):
                named = {"decoder_first_pipeline_num_layers": int(first)}
                assert refusal(namespace(num_layers, num_stages, **named)) == ""
                assert (num_layers - int(first)) % (num_stages - 1) == 0 and 0 < int(first) < num_layers


@pytest.mark.parametrize(
    ("first", "last", "fits"),
    [(1, 2, True), (1, 4, True), (2, 2, False), (None, 1, True), (None, 2, False), (9, None, False)],
)
def test_ends_that_are_given(first: int | None, last: int | None, fits: bool) -> None:
    args = namespace(7, 4, decoder_first_pipeline_num_layers=first, decoder_last_pipeline_num_layers=last)
    assert (refusal(args) == "") == fits
    assert fits or "in place of these." in refusal(args)
