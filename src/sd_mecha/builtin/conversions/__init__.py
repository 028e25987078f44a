"""Where merge methods name their model configs: conversions between layouts."""

from sd_mecha.builtin.conversions import blocks as blocks
