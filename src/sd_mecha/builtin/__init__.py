"""The plugs that come with the library. Importing this registers them; configs come first, since methods name them."""

from sd_mecha.builtin import formats as formats  # isort: split

from sd_mecha.builtin import configs as configs  # isort: split

from sd_mecha.builtin import adapters as adapters
from sd_mecha.builtin import conversions as conversions
from sd_mecha.builtin import methods as methods
from sd_mecha.extensions import translations as translations
