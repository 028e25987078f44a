"""Fields of hyper-parameters that say where a file tells them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from sd_mecha.extensions.header import Header, MissingShapeError
from sd_mecha.extensions.hyperparameters import count, flag, read_by, reader, size, widens
from sd_mecha.storage.contract import TensorEntry


@dataclass(frozen=True)
class Toy:
    width: int = size("blocks.*.up.weight", 1, "blocks.*.norm.weight", ("blocks.*.down.weight", 0))
    patch: int = size("out.weight", 0, per=4)
    depth: int = count("blocks", "others")
    guided: int = flag("guidance.weight", "guidance.bias")
    axes: int = read_by(lambda header: len(header.shape("out.weight")))


SHAPES = {
    "blocks.0.up.weight": (32, 8),
    "blocks.1.down.weight": (8, 32),
    "others.4.weight": (1,),
    "out.weight": (12, 8),
}


def header(shapes: dict[str, tuple[int, ...]]) -> Header:
    return Header({key: TensorEntry(shape, torch.float32) for key, shape in shapes.items()})


def test_every_field_is_read() -> None:
    assert reader(Toy)(header(SHAPES)) == Toy(8, 3, 5, 0, 2)
    assert reader(Toy)(header({**SHAPES, "guidance.bias": (8,)})) == Toy(8, 3, 5, 1, 2)


def test_other_places_tell_a_size_too() -> None:
    shapes = {key: shape for key, shape in SHAPES.items() if key != "blocks.0.up.weight"}
    assert reader(Toy)(header(shapes)).width == 8


def test_fields_have_no_default() -> None:
    with pytest.raises(TypeError, match="missing 4 required"):
        Toy(8)


def test_a_size_that_no_key_tells_is_missing() -> None:
    with pytest.raises(MissingShapeError, match=r"out\.weight"):
        reader(Toy)(header({"blocks.0.up.weight": (32, 8)}))


@pytest.mark.parametrize(("shape", "fits"), [((8, 32), True), ((8, 24), False), ((8, 32, 1, 1), True)])
def test_a_check_refuses_other_networks(shape: tuple[int, ...], fits: bool) -> None:
    read = reader(Toy, widens(4, "blocks.*.left.weight", "blocks.*.down.weight"))
    made = header({**SHAPES, "blocks.1.down.weight": shape})
    if fits:
        assert read(made).width == 8
    else:
        with pytest.raises(LookupError, match="other layers than those of Toy"):
            read(made)
