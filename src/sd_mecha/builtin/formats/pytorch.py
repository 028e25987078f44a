"""PyTorch checkpoints: what `torch.save` writes, whatever their names end in. They are inputs only."""

from __future__ import annotations

from sd_mecha.extensions.model_formats import LocationFormat, register_model_format
from sd_mecha.storage.locations import Location
from sd_mecha.storage.pytorch.reader import ZIP_MAGIC, TorchReader, is_archive, is_legacy


@register_model_format
class PyTorchFormat(LocationFormat):
    """Zip archives with a `data.pkl`, and the row of pickles that PyTorch wrote before 1.6."""

    identifier = "pytorch"

    def recognises(self, location: Location) -> bool:
        head = location.head
        if not head.startswith(ZIP_MAGIC):
            return is_legacy(head)
        file = location.open()
        try:
            return is_archive(file, head)
        finally:
            file.close()

    def open(self, location: Location) -> TorchReader:
        return TorchReader(location.open())
