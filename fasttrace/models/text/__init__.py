"""Text models, each family described once: `families` says how they differ, `description` and `units` what follows."""
