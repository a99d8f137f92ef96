"""The doctor: checks that the token maths is right on the user's own model, tokenizer, task and rewards."""

from pertoken.doctor.examination import CHECKS, examine, quick_certificate

__all__ = ["CHECKS", "examine", "quick_certificate"]
