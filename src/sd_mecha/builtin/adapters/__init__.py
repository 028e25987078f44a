"""The arithmetic of adapters: from the factors that a file stores to the change of a weight.

One module per family of algorithms, each of plain functions of tensors that know nothing of keys or configs, and of
the kinds that say how a file names the factors. Importing this package registers the kinds.
"""

from __future__ import annotations

from sd_mecha.builtin.adapters import full, glora, ia3, loha, lokr, lora, oft, peft_oft

__all__ = ["full", "glora", "ia3", "loha", "lokr", "lora", "oft", "peft_oft"]
