"""What leaves for the Hub: the model card, its checks, and the guard over secrets and local paths.

A layer of its own below the trainer (it imports nothing of hf_sage), so that the trainer and the benchmark share it.
"""

from hf_sage.publishing.card import render
from hf_sage.publishing.checks import problems_of
from hf_sage.publishing.facts import CardFacts, Paper, Result
from hf_sage.publishing.failures import UPLOAD_ERRORS, explain

__all__ = ["UPLOAD_ERRORS", "CardFacts", "Paper", "Result", "explain", "problems_of", "render"]
