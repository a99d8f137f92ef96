"""The language model as a policy: loading, scoring, checkpoints."""
