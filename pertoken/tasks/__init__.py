"""Where problems come from: items in splits, made from files or from the documentation on this machine."""
