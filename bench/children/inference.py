"""Find the config of a checkpoint of SDXL from its header; prints the times as JSON.

The first time builds the configs that it may be. The later times are for other headers of that size.
"""

from __future__ import annotations

import json
import time

from sd_mecha.extensions import model_configs
from sd_mecha.storage.contract import TensorEntry

TIMES = 10


def main() -> None:
    sdxl = model_configs.resolve("sdxl-sgm")
    header: dict[str, TensorEntry | None] = {
        key: TensorEntry(m.shape or (), m.dtype) for key, m in sdxl.keys().items() if m.dtype is not None
    }
    others = [{**header, f"other.{number}": None} for number in range(TIMES)]
    seconds = []
    for entries in (header, *others):
        started = time.perf_counter()
        fits = model_configs.fits(entries)
        seconds.append(time.perf_counter() - started)
        assert min(fits, key=lambda config: fits[config]) is sdxl
    print(json.dumps({"keys": len(header), "first": seconds[0], "later": sorted(seconds[1:])[TIMES // 2]}))


if __name__ == "__main__":
    main()
