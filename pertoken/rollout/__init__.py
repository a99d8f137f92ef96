"""From prompts to episodes."""
