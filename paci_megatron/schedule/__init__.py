"""Schedules as data: what each stage does, in which order. Pure Python: no torch, no megatron."""

from .actions import Action, Kind, format_actions, parse_actions
from .schedules import one_f_one_b_flush, paci, with_transfers
from .validate import PlanError, validate

__all__ = [
    "Action",
    "Kind",
    "PlanError",
    "format_actions",
    "one_f_one_b_flush",
    "paci",
    "parse_actions",
    "validate",
    "with_transfers",
]
