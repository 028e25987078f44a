"""An adapter that is being made: its tensors, and for each module its rank and how far it is from what it is of."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sd_mecha.adapters.styles import lora_keys
from sd_mecha.errors import AdapterError
from sd_mecha.merging import merge
from sd_mecha.recipes.building import model
from sd_mecha.storage.memory import METADATA_KEY

FACTS_KEY = "mecha_adapter"
"""Where the metadata of an adapter tells, as JSON, the rank and the relative error of each module."""

DIFFUSERS_KEY = "lora_adapter_metadata"
"""Where diffusers looks for the ranks and strengths of modules that differ from each other."""


@dataclass
class Adapter:
    """The tensors of an adapter, in the dtype that they are stored in.

    Attributes:
        dtype: that of the factors.
        alphas: whether to say the strength of each module.
        endings: the style of the endings of keys.
    """

    dtype: torch.dtype
    endings: str
    alphas: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    _missed: float = 0.0
    _whole: float = 0.0

    def add_lora(self, module: str, up: Tensor, down: Tensor, kernel: tuple[int, ...] = ()) -> Tensor:
        """Add the factors of a module; what they make once they are stored is returned, as a matrix."""
        stored = self.add_factors(module, up, down, kernel)
        return stored[0] @ stored[1]

    def add_factors(self, module: str, up: Tensor, down: Tensor, kernel: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Add the factors of a module; they are returned as they are once they are stored.

        Args:
            up: (rows, rank).
            down: (rank, columns), a kernel flattened into the columns.
            kernel: dimensions behind the first two of the weight.
        """
        rank = up.shape[1]
        keys = lora_keys(module, self.endings)
        stored = up.to(self.dtype), down.to(self.dtype)
        self.put(keys["down"], stored[1].reshape(rank, down.shape[1] // math.prod(kernel), *kernel))
        self.put(keys["up"], stored[0].reshape(up.shape[0], rank, *[1] * len(kernel)))
        if self.alphas:
            # as many as the rank: what readers divide by
            self.put(f"{module}.alpha", torch.tensor(float(rank)))
        self.ranks[module] = rank
        return stored[0].to(up.dtype), stored[1].to(up.dtype)

    def put(self, key: str, tensor: Tensor) -> None:
        """Add a tensor.

        Raises:
            AdapterError: two modules have one name in this style.
        """
        if key in self.tensors:
            raise AdapterError(f"two modules are called {key!r} in this style; choose one that keeps dots in names")
        self.tensors[key] = tensor.to(self.dtype).contiguous()

    def measure(self, module: str, wanted: Tensor, made: Tensor) -> None:
        """Note how far a module is from what it should be; `made` is overwritten."""
        off = made.sub_(wanted)  # the largest weights need no third copy
        missed, whole = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (off, wanted))
        self.note(module, missed, whole)

    def note(self, module: str, missed: float, whole: float) -> None:
        """Note the norm of what a module misses, and that of what it should be."""
        self.errors[module] = missed / whole if whole else 0.0
        self._missed += missed**2
        self._whole += whole**2

    def finished(self, style: str, output: Any, **facts: Any) -> dict[str, Any]:
        """The state dict with its metadata, which is written to a file as well if a path is given.

        Args:
            style: name of the style.
            output: the path, or None.
            facts: what else the metadata tells.
        """
        facts = {**facts, "style": style}
        modules = {
            name: {
                **({"rank": self.ranks[name]} if name in self.ranks else {}),
                **({"error": round(self.errors[name], 6)} if name in self.errors else {}),
            }
            for name in dict.fromkeys([*self.ranks, *self.errors])
        }
        if self.errors:
            facts["error"] = round(math.sqrt(self._missed / self._whole), 6) if self._whole else 0.0
        metadata = {"format": "pt", FACTS_KEY: json.dumps({**facts, "modules": modules})}
        if style == "diffusers" and self.ranks and facts.get("kind") != "lokr":
            metadata[DIFFUSERS_KEY] = json.dumps(self._for_diffusers())
        result = {**self.tensors, METADATA_KEY: metadata}
        if output is not None:
            write(result, output)
        return result

    def _for_diffusers(self) -> dict[str, Any]:
        """Ranks and strengths, which diffusers takes to be the same for all modules of a part unless it is told."""
        told: dict[str, Any] = {}
        for part in dict.fromkeys(name.partition(".")[0] for name in self.ranks):
            ranks = {n.partition(".")[2]: r for n, r in self.ranks.items() if n.partition(".")[0] == part}
            usual = max(set(ranks.values()), key=list(ranks.values()).count)
            others = {name: rank for name, rank in ranks.items() if rank != usual}
            told |= {
                f"{part}.r": usual,
                f"{part}.lora_alpha": usual,
                f"{part}.target_modules": sorted(ranks),
                f"{part}.rank_pattern": others,
                f"{part}.alpha_pattern": others,
            }
        return told


def write(adapter: dict[str, Any], output: str | os.PathLike[str]) -> None:
    """Write the state dict of an adapter to a file, as it is.

    Raises:
        OutputError: it cannot be written; a file of that name stays as it was.
    """
    node = model(adapter, config="structural")
    merge(node, output=output, merge_dtype=None, output_dtype=None, tqdm=None, omit_non_finite_inputs=False)
