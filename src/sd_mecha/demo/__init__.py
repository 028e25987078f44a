"""The main job on real data, small enough for any machine: `sd-mecha demo`."""
