"""Where sd-mecha 1 kept its built-in plugs; kept importable for code written against it."""

from __future__ import annotations

from sd_mecha.extensions.builtin import merge_methods as merge_methods
