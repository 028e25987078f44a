"""What release 1 kept in a module of this name."""

from sd_mecha.errors import NonFiniteStateDictKeyError as NonFiniteStateDictKeyError
from sd_mecha.errors import StateDictKeyError as StateDictKeyError
from sd_mecha.storage.contract import TensorEntry as TensorMetadata  # noqa: F401
