"""Floor 0: bytes to tensors and back, by range.

A reader answers what a model holds and copies any byte range of a tensor; a writer takes ranges in any order
and publishes all of them at once or nothing at all. Nothing here knows what a recipe is.
"""
