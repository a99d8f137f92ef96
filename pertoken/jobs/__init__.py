"""Whole jobs: one run (`run`), many of them (`many`, and by it `crossval`, `search`), a model in use (`generation`),
some steps under a stopwatch (`profiling`)."""
