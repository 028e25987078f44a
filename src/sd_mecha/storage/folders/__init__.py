"""Models in several files: shards with an index, pipelines, and the folders that are written."""
