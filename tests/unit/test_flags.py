"""Megatron's flags under PACI: refused with a reason, or switched off with a line."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from lab.checks.flag_tables import GUIDE, SUPPORTED, with_tables
from paci_megatron.config import ConfigError
from paci_megatron.flags import REFUSED, SWITCHED_OFF, Refused, SwitchedOff, adapt_flags


def namespace(**changes: Any) -> argparse.Namespace:
    values = {
        "optimizer": "adam",
        "paci_strict": False,
        "pipeline_model_parallel_layout": None,
        "pipeline_model_parallel_size": 4,
        "paci_emulate_stages": None,
    }
    return argparse.Namespace(**{**values, **changes})


def refused_value(rule: Refused) -> Any:
    """A value that a user may give the flag."""
    values = {"fp8": "hybrid", "fp4": "e2m1", "vision_pretraining_type": "dino"}
    number = rule.flag.endswith(("-instances", "-interval", "-layers", "-stage", "-rank", "-mins"))
    return values.get(rule.attribute, 2 if number else True)


def test_an_ordinary_command_line_has_nothing_refused_or_switched_off(megatron_defaults: Any) -> None:
    assert adapt_flags(namespace()) == []
    # Megatron's default that asks all ranks in every iteration.
    (line,) = adapt_flags(argparse.Namespace(**{**vars(megatron_defaults.values), **vars(namespace())}))
    assert line.startswith("--rerun-mode is off under paci: ")
    # Nobody gave it, so nobody can remove it.
    strict = namespace(**{**vars(megatron_defaults.values), **vars(namespace()), "paci_strict": True})
    assert adapt_flags(strict) == [line]


@pytest.mark.parametrize("rule", REFUSED, ids=lambda rule: rule.flag)
def test_each_refused_flag_is_refused_with_reason_and_remedy(rule: Refused) -> None:
    value = refused_value(rule)
    with pytest.raises(ConfigError) as caught:
        adapt_flags(namespace(**{rule.attribute: value}))
    message = str(caught.value)
    assert message.startswith(rule.flag) and rule.reason in message and rule.remedy in message
    assert value is True or str(value) in message
    assert "\n" not in message


@pytest.mark.parametrize("rule", REFUSED, ids=lambda rule: rule.flag)
def test_each_refused_flag_exists_in_megatron_and_is_off_by_default(rule: Refused, megatron_defaults: Any) -> None:
    if rule.attribute == "export_kd_teacher_load":
        return  # added by scripts that use ModelOpt
    assert rule.flag in megatron_defaults.flags
    assert not rule.is_set(getattr(megatron_defaults.values, rule.attribute))


def test_all_refusals_come_at_once() -> None:
    first, second = REFUSED[0], REFUSED[1]
    with pytest.raises(ConfigError) as caught:
        adapt_flags(namespace(**{rule.attribute: refused_value(rule) for rule in (first, second)}))
    assert [line.split()[0] for line in str(caught.value).splitlines()] == [first.flag, second.flag]


@pytest.mark.parametrize("rule", SWITCHED_OFF, ids=lambda rule: rule.flag)
def test_what_is_not_needed_is_switched_off_with_a_line_or_refused_if_asked_for_strictly(
    rule: SwitchedOff, megatron_defaults: Any
) -> None:
    assert rule.flag in megatron_defaults.flags
    args = namespace(**{rule.attribute: "something else"})
    assert adapt_flags(args) == [rule.line]
    assert rule.line.startswith(f"{rule.flag} is off under paci: ") and getattr(args, rule.attribute) == rule.value
    assert adapt_flags(args) == []
    with pytest.raises(ConfigError, match=rf"^--paci-strict: {rule.flag} is off under paci"):
        adapt_flags(namespace(**{rule.attribute: "something else", "paci_strict": True}))


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("E|t|t|t|t|t|t|tL", "Et*2|t*2|t*2|tL"),  # of 9 layers, E and L among them, the first stage has the one too many
        ("Ettt|(tt|)*6,L", "Et*4|t*4|t*4|t*3L"),
        ("Et*3|(tt|)*29,m|L", "Et*15|t*16|t*16|t*14mL"),
        ("Et|(tt|)*6mL", "Et*3|t*4|t*4|t*2mL"),
        ("E|t|t|t|t|t|mm|L", "Et|t*2|t*2|mmL"),  # more than any other stage has, without a layer
    ],
)
def test_a_layout_of_several_chunks_a_stage_becomes_one_of_one(layout: str, expected: str) -> None:
    args = namespace(pipeline_model_parallel_layout=layout)
    (line,) = adapt_flags(args)
    assert args.pipeline_model_parallel_layout == expected
    assert f"one chunk a stage under paci: {expected}, " in line
    assert adapt_flags(args) == [], "one chunk a stage already"


def test_a_hybrid_pattern_of_several_chunks_a_stage_becomes_one_of_one() -> None:
    args = namespace(hybrid_layer_pattern="M-M|M*|M-|MM|-|M|*|M/M", pipeline_model_parallel_size=4)
    (line,) = adapt_flags(args)
    assert args.hybrid_layer_pattern == "M-MM*|M-MM|-M|*M/M" and args.hybrid_layer_pattern in line
    assert adapt_flags(args) == []


def test_the_guide_s_tables_are_those_of_the_code() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run python -m lab.checks.flag_tables"


@pytest.mark.parametrize(("flag", "test"), [(flag, test) for flag, _, test in SUPPORTED])
def test_what_the_guide_calls_supported_is_in_its_test_and_nowhere_refused_or_off(flag: str, test: str) -> None:
    assert f'"{flag}"' in (GUIDE.parents[1] / "tests" / test).read_text(encoding="utf-8")
    assert flag not in {rule.flag for rule in REFUSED} | {rule.flag for rule in SWITCHED_OFF}
