"""Where merge methods name their model configs: conversions between layouts."""

from sd_mecha.builtin.conversions import blocks as blocks
from sd_mecha.builtin.conversions import extraction as extraction
from sd_mecha.builtin.conversions import loras as loras
from sd_mecha.builtin.conversions import parts as parts
from sd_mecha.builtin.conversions import sd1 as sd1
from sd_mecha.builtin.conversions import sdxl as sdxl
