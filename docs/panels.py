"""What the pictures of docs/methods.md show: for each family, inputs and what its methods make of them.

Nothing here draws, so that a test can compute every panel without matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import sd_mecha
from docs.inputs import SIZE, A, B, bump, noise, shape_of_points, waves
from sd_mecha.extensions.merge_methods import resolve
from sd_mecha.recipes.nodes import RecipeNode


@dataclass(frozen=True)
class Panel:
    """One small image: a tensor as a heat map."""

    title: str
    tensor: Tensor
    method: str = ""
    """The method that it is the result of; empty for inputs and for what a result is compared with."""


@dataclass(frozen=True)
class Points(Panel):
    """A tensor of two columns as points of a plane; `paths` are drawn as lines."""

    paths: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """The image of one family."""

    caption: str
    panels: Callable[[], Sequence[Panel]]
    columns: int = 4


def merged(identifier: str, *inputs: Tensor, space: str = "delta", **options: object) -> Tensor:
    """What the engine makes of tensors with one method."""
    nodes = [sd_mecha.model({"w": tensor}, merge_space=space) for tensor in inputs]
    return computed(resolve(identifier)(*nodes, **options))  # type: ignore[arg-type]


def computed(recipe: RecipeNode) -> Tensor:
    """The one tensor of a recipe."""
    result = sd_mecha.merge(recipe, strict_merge_space=None, output_dtype=None)
    assert result is not None  # without a file to write, there is a state dict
    tensor = result["w"]
    assert isinstance(tensor, Tensor)
    return tensor


def shown(identifier: str, note: str, *inputs: Tensor, space: str = "delta", **options: object) -> Panel:
    """The panel of a method, titled with its name and what was passed."""
    return Panel(f"{identifier}\n{note}", merged(identifier, *inputs, space=space, **options), identifier)


def _inputs() -> list[Panel]:
    return [Panel("A", A), Panel("B", B)]


def _mean() -> Panel:
    return Panel("for comparison:\nmean of A and B", (A + B) / 2)


def linear() -> list[Panel]:
    return [
        *_inputs(),
        shown("weighted_sum", "A, B, alpha=0.25", A, B, alpha=0.25),
        shown("n_average", "A, B", A, B),
        shown("subtract", "A, B", A, B, space="weight"),
        shown("scale", "A, alpha=-0.5", A, alpha=-0.5),
        shown("add_difference", "A, B, alpha=0.5", A, B, alpha=0.5),
        shown("weighted_sum", "A, B, alpha=1.5: beyond B", A, B, alpha=1.5),
    ]


def spherical() -> list[Panel]:
    a, b = torch.tensor([0.9, 0.0]), torch.tensor([0.0, 0.9])
    steps = torch.linspace(0, 1, 21).tolist()
    paths = {name: torch.stack([merged(name, a, b, alpha=t) for t in steps]) for name in ("weighted_sum", "slerp")}
    return [
        *_inputs(),
        Panel("for comparison:\nweighted_sum, alpha=0.5", (A + B) / 2),
        shown("slerp", "A, B, alpha=0.5", A, B, alpha=0.5),
        shown("perpendicular_component", "A, B", A, B),
        Points("two tensors of two entries,\nalpha from 0 to 1", torch.stack([a, b]), paths=paths),
    ]


def geometric() -> list[Panel]:
    base = torch.full((SIZE, SIZE), 0.25)
    a, b = base * torch.exp(1.3 * A), base * torch.exp(1.3 * B)
    return [
        *_inputs(),
        shown("geometric_sum", "A, B, alpha=0.5", A, B, alpha=0.5),
        _mean(),
        Panel("a = c exp(1.3 A)", a),
        Panel("b = c exp(1.3 B)", b),
        Panel("c = 0.25", base),
        shown("multiply_quotient", "a, b, c, alpha=1", a, b, base, space="weight", alpha=1.0),
    ]


def fourier() -> list[Panel]:
    a, b = A, bump(0.2, -0.35, 0.5, 0.45) + waves(0.4)
    return [
        Panel("A", a),
        Panel("B: a hill and a ripple", b),
        shown("crossover", "alpha=0.5, tilt=0:\nlow of A, high of B", a, b, alpha=0.5, tilt=0.0),
        shown("crossover", "alpha=0.5, tilt=2:\nlow of B, high of A", a, b, alpha=0.5, tilt=2.0),
        shown("crossover", "alpha=0.8, tilt=0:\nmore from B", a, b, alpha=0.8, tilt=0.0),
        shown("crossover", "alpha=0.5, tilt=0.5:\na soft step", a, b, alpha=0.5, tilt=0.5),
        shown("crossover", "alpha=0.5, tilt=1:\nweighted_sum", a, b, alpha=0.5, tilt=1.0),
        shown("crossover", "alpha=0.2, tilt=0:\nmore from A", a, b, alpha=0.2, tilt=0.0),
    ]


def cosine() -> list[Panel]:
    a, b = A.clone(), B.clone()
    b[:, :10] = a[:, :10] * 0.5
    return [
        Panel("A", a),
        Panel("B: its left third is A / 2", b),
        shown("add_cosine_a", "alpha=0: all of A\nwhere columns agree", a, b, space="weight", alpha=0.0),
        shown("add_cosine_b", "alpha=0: the whole\ntensor counts too", a, b, space="weight", alpha=0.0),
    ]


def masks() -> list[Panel]:
    base = torch.zeros(SIZE, SIZE)
    names = ("train_difference_mask", "add_opposite_mask", "add_strict_opposite_mask")
    models = [sd_mecha.model({"w": tensor}, merge_space="weight") for tensor in (A, B, base)]
    added = [
        Panel(
            f"add_difference(A, B, C,\nalpha={name})",
            computed(sd_mecha.add_difference(*models, alpha=resolve(name)(*models, alpha=0.5))),
        )
        for name in names
    ]
    strengths = [shown(name, "A, B, C=0, alpha=0.5", A, B, base, space="weight", alpha=0.5) for name in names]
    return [Panel("A", A), *strengths, Panel("B", B), *added]


def ties() -> list[Panel]:
    return [
        *_inputs(),
        _mean(),
        shown("ties_sum", "k=1: no trimming", A, B, k=1.0),
        shown("ties_sum", "k=0.2", A, B, k=0.2),
        shown("ties_sum", "k=0.2, vote_sgn=True", A, B, k=0.2, vote_sgn=True),
        shown("ties_sum_extended", "k=0.2, apply_stock=True", A, B, k=0.2, apply_stock=True),
        shown("ties_sum_extended", "k=0.2, apply_median=True", A, B, k=0.2, apply_median=True),
    ]


def dropout() -> list[Panel]:
    return [
        *_inputs(),
        _mean(),
        shown("dropout", "probability=0.5", A, B, probability=0.5, seed=1),
        shown("dropout", "probability=0.5,\noverlap=0: never both", A, B, probability=0.5, overlap=0.0, seed=1),
        shown("dropout", "probability=0.5,\nrescale=0", A, B, probability=0.5, rescale=0.0, seed=1),
        shown("ties_sum_with_dropout", "probability=0.5, k=1", A, B, probability=0.5, k=1.0, seed=1),
        shown(
            "ties_sum_with_dropout",
            "probability=0.5, k=1,\ndella_eps=1: small ones go",
            *(A, B),
            probability=0.5,
            della_eps=1.0,
            k=1.0,
            seed=1,
        ),
    ]


def stock() -> list[Panel]:
    twin = A + noise(1, 0.1)
    return [
        *_inputs(),
        _mean(),
        shown("model_stock", "A, B: little agreement", A, B),
        Panel("A2: A and some noise", twin),
        Panel("for comparison:\nmean of A and A2", (A + twin) / 2),
        shown("model_stock", "A, A2: much agreement", A, twin),
        shown("model_stock", "A, B, filter_wise=True", A, B, filter_wise=True),
    ]


def median() -> list[Panel]:
    good = [A + noise(seed, 0.15) for seed in (1, 2, 3)]
    broken = -3 * B + noise(4, 1.0)
    return [
        Panel("one of three noisy copies of A", good[0]),
        Panel("a broken model", broken),
        Panel("for comparison:\nmean of the four", (sum(good, broken)) / 4),
        shown("geometric_median", "of the four", *good, broken),
    ]


def svd() -> list[Panel]:
    noisy = A + noise(1, 0.08)
    return [
        Panel("A", A),
        Panel("D: A and some noise", noisy),
        *(shown("truncate_rank", f"D, rank={rank}", noisy, rank=rank) for rank in (1, 2, 4, 8, 16)),
        Panel("what rank=8 leaves out", noisy - merged("truncate_rank", noisy, rank=8)),
    ]


def kronecker() -> list[Panel]:
    tile = bump(0, 0, 1.0, 0.6)[::4, ::4].contiguous()
    strengths = torch.tensor(
        [[0.9, 0.2, 0.0, -0.6], [0.0, 0.7, -0.3, 0.0], [-0.8, 0.0, 0.4, 0.9], [0.3, -0.5, 0.0, 0.6]]
    )
    pattern = torch.kron(strengths, tile) + noise(1, 0.12)
    return [
        Panel("A", A),
        *(shown("truncate_kronecker", f"A, kronecker_ratio={r}", A, kronecker_ratio=r) for r in (0.2, 0.4, 0.6)),
        Panel("D: one tile, repeated\nby a 4 x 4 matrix, and noise", pattern),
        *(shown("truncate_kronecker", f"D, kronecker_ratio={r}", pattern, kronecker_ratio=r) for r in (0.2, 0.4, 0.6)),
    ]


def rotation() -> list[Panel]:
    a, b = shape_of_points()

    def turned(note: str, alignment: float, alpha: float) -> Panel:
        result = merged("rotate", a, b, space="weight", alignment=alignment, alpha=alpha)
        return Points(f"rotate\n{note}", result, "rotate")

    return [
        Points("A: a neuron per point", a),
        Points("B", b),
        Points("for comparison:\nweighted_sum, alpha=0.5", (a + b) / 2),
        turned("alignment=0.5, alpha=0:\nhalf of the way", 0.5, 0.0),
        turned("alignment=1, alpha=0:\nA, turned to B", 1.0, 0.0),
        turned("alignment=1, alpha=0.5:\nand half of B", 1.0, 0.5),
        turned("alignment=0, alpha=0.5:\nB turned back, half", 0.0, 0.5),
        turned("alignment=0.5, alpha=0.5", 0.5, 0.5),
    ]


def regions() -> list[Panel]:
    return [
        *_inputs(),
        shown("tensor_sum", "width=0.5", A, B, width=0.5),
        shown("tensor_sum", "width=0.5, offset=0.75", A, B, width=0.5, offset=0.75),
        shown("top_k_tensor_sum", "width=1: values of A\nin the order of B", A, B),
        shown("top_k_tensor_sum", "width=0.1, offset=0.9:\nlarge ones alone", A, B, width=0.1, offset=0.9),
    ]


def bounds() -> list[Panel]:
    far = merged("weighted_sum", A, B, alpha=2.0)
    return [
        *_inputs(),
        Panel("E: weighted_sum of A and B,\nalpha=2", far),
        shown("clamp", "E, bounds A and B", far, A, B),
        Panel("C: the negative of A", -A),
        shown("clamp", "E, bounds A, B and C", far, A, B, -A),
        shown("clamp", "E, bounds A, B and C,\nstiffness=1", far, A, B, -A, stiffness=1.0),
    ]


def casting() -> list[Panel]:
    def rounded(dtype: str, note: str) -> Panel:
        return Panel(f"cast\n{note}", merged("cast", A, dtype=dtype).float(), "cast")

    return [
        Panel("A", A),
        rounded("float8_e4m3fn", 'dtype="float8_e4m3fn"'),
        rounded("float8_e5m2", 'dtype="float8_e5m2"'),
        rounded("int8", 'dtype="int8": the part\nbefore the point'),
    ]


PICTURES: Mapping[str, Picture] = {
    "linear": Picture("Every entry is treated alike, hills and spikes.", linear),
    "spherical": Picture(
        "A weighted sum takes the chord and loses length; slerp keeps to the arc.", spherical, columns=3
    ),
    "geometric": Picture(
        "`geometric_sum` keeps what both have. `multiply_quotient` changes `a` only below right, where `a` and `b` lie "
        "on different sides of `c`.",
        geometric,
    ),
    "fourier": Picture("The coarse shape of one, the fine detail of the other.", fourier),
    "cosine": Picture("On the left the columns point the same way in both, and stay those of A.", cosine),
    "masks": Picture("Above, the masks; below, B added to A through each of them.", masks),
    "ties": Picture(
        "Below right A and B contradict each other: with two deltas a vote of signs is a draw, one of sums is not.",
        ties,
    ),
    "dropout": Picture("Entries are left out at random, and what stays is enlarged.", dropout),
    "stock": Picture("The less the deltas agree, the less of their mean is taken.", stock),
    "median": Picture("The mean follows the broken model; the median does not.", median),
    "svd": Picture("Two ranks hold the hills; the spikes take more, and with those comes the noise.", svd),
    "kronecker": Picture(
        "What is one tile, repeated, is kept and freed of noise where the ratio fits its size (0.4 for 4 x 4 in "
        "32 x 32); everything else turns into blocks.",
        kronecker,
    ),
    "rotation": Picture("Different directions cancel in a weighted sum; turned first, they do not.", rotation),
    "regions": Picture("Nothing is averaged: values are copied, or put in another order.", regions, columns=3),
    "bounds": Picture("An extrapolation E, brought back to what other models span.", bounds),
    "casting": Picture("What storing in few bits leaves of A.", casting),
}
"""By family. Families without one copy bytes, or tell something about tensors."""
