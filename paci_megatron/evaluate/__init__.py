"""Perplexity of a model on text: what is scored, with which context, and what the sum of it is divided by.

The package knows Megatron's core and an already built model; evaluate/evaluator.py builds one from a checkpoint.
"""

from __future__ import annotations


class EvaluationError(ValueError):
    """The model's losses cannot be made into figures."""
