"""Floor 4: from programs to tensors; never sees a recipe."""
