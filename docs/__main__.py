"""`python -m docs`: write docs/methods.md and docs/models.md, and draw its pictures unless told `--text`."""

from __future__ import annotations

import sys

from docs import gallery, models_page


def main(arguments: list[str]) -> None:
    for written in (gallery, models_page):
        written.PAGE.write_text(written.page(), encoding="utf-8", newline="\n")
    if "--text" not in arguments:
        from docs.pictures import draw_all

        draw_all(gallery.IMAGES)


if __name__ == "__main__":
    main(sys.argv[1:])
