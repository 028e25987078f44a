"""Floor 3: from a recipe and file headers to a plan."""
