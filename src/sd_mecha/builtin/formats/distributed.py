"""Folders of `torch.distributed.checkpoint`, as training on several devices writes them. They are inputs only."""

from __future__ import annotations

from sd_mecha.extensions.model_formats import LocationFormat, register_model_format
from sd_mecha.storage.locations import Location
from sd_mecha.storage.pytorch.distributed import METADATA, DcpReader


@register_model_format
class DistributedFormat(LocationFormat):
    """Folders with a file `.metadata`."""

    identifier = "torch_distributed"

    def recognises(self, location: Location) -> bool:
        return location.is_folder() and location.child(METADATA).is_file()

    def open(self, location: Location) -> DcpReader:
        return DcpReader(location)
