"""Checks of a model before it is used: is it good enough, safe, steady, and no worse than the one before it?

suite -> the answers of the model, as asked and asked otherwise -> outcomes, each with the samples that failed
"""

from pertoken.validation.examination import validate
from pertoken.validation.outcomes import Failure, Outcome, Report
from pertoken.validation.suite import Suite, load_suite

__all__ = ["Failure", "Outcome", "Report", "Suite", "load_suite", "validate"]
