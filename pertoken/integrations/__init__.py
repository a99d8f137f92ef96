"""Other projects' tasks and environments, one module each; nothing else in the package knows of them."""
