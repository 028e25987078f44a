"""What a user asks of an output beside its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sd_mecha.errors import OptionError
from sd_mecha.storage.locations import Location

_FOLDER = "write a folder, with output_format='huggingface' (--format huggingface)"
_INSTEAD = dict.fromkeys(("checksums", "resume"), "name an output that ends in .safetensors")


@dataclass(frozen=True)
class OutputRequest:
    """Handed to the format that writes an output; None and False ask for nothing.

    Attributes:
        shard_size: the most bytes of tensors that one file of the output may hold.
        side_files: the folder, or the file, of the model whose configuration, tokenizer and the like go along.
        resume: what the output is made of, as a fingerprint: a writer goes on where one with the same fingerprint
            stopped, and keeps what it has when it stops itself.
        checksums: True: `checksums.ChecksumWriter` will read back what was stored and replace the metadata before
            commit. A format that cannot read back what it stored, or has no metadata, refuses it.
        inputs: where the models of the recipe lie, in its order: what else a format might go by. Nobody asked for it.
        scaled: whether matrices come as fp8 with scales beside them; any format can hold those.
    """

    shard_size: int | None = None
    side_files: Location | None = None
    resume: str | None = None
    checksums: bool | None = None
    inputs: tuple[Location, ...] = ()
    scaled: bool = False

    def given(self) -> Iterator[tuple[str, Any]]:
        """Names and values of what is asked for."""
        asked = (f.name for f in fields(self) if f.name not in ("inputs", "scaled"))
        return ((name, value) for name in asked if (value := getattr(self, name)) is not None)

    def refuse(self, identifier: str, path: Path, *names: str) -> None:
        """Refuse those things, if they are asked for.

        Raises:
            OptionError: one of them is.
        """
        for name, value in self.given():
            if name in names:
                shown = "" if name in ("resume", "checksums") else f"={getattr(value, 'name', value)!r}"
                raise OptionError(
                    f"{name}{shown}: the format {identifier!r} of output {str(path)!r} has nothing of that kind; "
                    f"leave it out, or {_INSTEAD.get(name, _FOLDER)}"
                )

    def refuse_scales(self, identifier: str, path: Path) -> None:
        """Refuse scaled fp8, where the library that reads the format would take the values without their scales.

        Raises:
            OptionError: the tensors are that.
        """
        if self.scaled:
            raise OptionError(
                f"scaled_fp8: the library that loads the format {identifier!r} of output {str(path)!r} does not read "
                "these scales; leave it out, or name an output that ends in .safetensors (one file, no shard_size)"
            )
