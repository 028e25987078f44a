"""Merge spaces through real merges: what parameters demand, how symbols tie them together, what is preferred."""

from collections.abc import Iterator

import pytest
from torch import Tensor

import sd_mecha
from sd_mecha.errors import MergeSpaceError
from sd_mecha.extensions import merge_spaces
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.extensions.merge_spaces import MergeSpace, MergeSpaceSymbol
from tests.extensions.support import model, numbers, run

SHARED = MergeSpaceSymbol("weight", "delta")


@merge_method(register=False)
def same_space(a: Parameter(Tensor), b: Parameter(Tensor)) -> Return(Tensor):
    return a + b


@merge_method(register=False)
def either(a: Parameter(Tensor, {"weight", "delta"}), b: Parameter(Tensor, ("delta",))) -> Return(Tensor, "delta"):
    return a + b


@merge_method(register=False)
def tied(a: Parameter(Tensor, SHARED), b: Parameter(Tensor, "delta"), c: Parameter(Tensor, SHARED)) -> Return(
    Tensor, SHARED
):
    return a + b + c


@pytest.fixture
def latent() -> Iterator[MergeSpace]:
    space = merge_spaces.register_merge_space("latent")
    yield space
    merge_spaces._registry.remove("latent")


def spaces_of(recipe: object, **asked: object) -> list[str]:
    with sd_mecha.open_graph(recipe) as graph:
        return [space.identifier for space in graph.root_candidates(**asked).merge_space]


W, D = model(x=1.0), model(_space="delta", x=2.0)


def test_unannotated_tensors_share_one_space_with_the_result() -> None:
    assert spaces_of(same_space(W, W)) == ["weight"]
    assert spaces_of(same_space(D, D)) == ["delta"]
    with pytest.raises(MergeSpaceError) as error:
        run(same_space(W, D))
    assert "weight is declared (at same_space > a: in-memory model)" in str(error.value)
    assert "delta is declared (at same_space > b: in-memory model)" in str(error.value)
    assert isinstance(error.value, TypeError)


def test_a_set_of_spaces_takes_each_of_them() -> None:
    assert numbers(either(W, D)) == {"x": 3.0}
    assert numbers(either(D, D)) == {"x": 4.0}
    with pytest.raises(MergeSpaceError, match="delta is what either takes as b"):
        run(either(W, W))
    with pytest.raises(MergeSpaceError, match="delta or weight is what either takes as a"):
        run(either(model(_space="param", x=1.0), D))


def test_a_symbol_ties_parameters_and_result_together() -> None:
    assert spaces_of(tied(W, D, W)) == ["weight"]
    assert spaces_of(tied(D, D, D)) == ["delta"]
    with pytest.raises(MergeSpaceError):
        run(tied(W, D, D))
    param = model(_space="param", x=1.0)
    with pytest.raises(MergeSpaceError, match=r"delta or weight is what tied returns .*but param is declared"):
        run(tied(param, D, param))


def test_a_symbol_is_a_new_one_in_each_call() -> None:
    recipe = same_space(same_space(D, D), sd_mecha.subtract(same_space(W, W), W))
    assert numbers(recipe) == {"x": 5.0}


def test_constraints_travel_through_the_whole_recipe() -> None:
    far = W
    for _ in range(5):
        far = same_space(far, model(x=0.0))
    with pytest.raises(MergeSpaceError, match=r"weight is declared.*but delta"):
        run(sd_mecha.add_difference(W, far))


def test_every_contradiction_is_reported() -> None:
    with pytest.raises(MergeSpaceError) as error:
        run(sd_mecha.n_average(either(W, W), either(D, model(x=2.0))))
    assert len(error.value.problems) == 2


def test_parameters_with_defaults_and_of_other_types_are_params() -> None:
    @merge_method(register=False)
    def mixed(a: Parameter(Tensor), factor: Parameter(float), other: Parameter(Tensor) = 1.0) -> Return(Tensor):
        return a * factor * other

    assert numbers(mixed(D, model(_space="param", x=3.0), model(_space="param", x=5.0))) == {"x": 30.0}
    with pytest.raises(MergeSpaceError, match="param is what mixed takes as factor"):
        run(mixed(D, W))
    with pytest.raises(MergeSpaceError, match="param is what mixed takes as other"):
        run(mixed(D, 1.0, W))


def test_the_result_must_be_a_weight_unless_said_otherwise() -> None:
    with pytest.raises(MergeSpaceError, match=r"weight is asked of the result[\s\S]*strict_merge_space=None"):
        sd_mecha.merge(D)
    for accepted in ("delta", ["weight", "delta"], {merge_spaces.resolve("delta")}, None):
        assert sd_mecha.merge(D, strict_merge_space=accepted)["x"] == 2
    with pytest.raises(KeyError, match="did you mean 'delta'"):
        sd_mecha.merge(D, strict_merge_space="dleta")


def test_what_is_left_open_is_a_weight_first(latent: MergeSpace) -> None:
    open_node = sd_mecha.model(W.state_dict, merge_space=None)
    assert spaces_of(open_node) == ["weight", "delta", "param", "latent"]
    with sd_mecha.open_graph(open_node) as graph:
        assert graph.finalize_root().merge_space.identifier == "weight"
        assert graph.finalize_root(merge_space_preference=["latent", "delta"]).merge_space is latent
        assert graph.finalize_root(merge_space={"param", "delta"}).merge_space.identifier == "delta"
        assert graph.finalize_root(merge_space="latent").merge_space is latent
    with sd_mecha.plan(open_node, strict_merge_space=None) as planned:
        assert planned.finalized().merge_space.identifier == "weight"


def test_candidates_can_be_narrowed_and_preferred() -> None:
    open_node = sd_mecha.model(W.state_dict, merge_space=None)
    assert spaces_of(open_node, merge_space=["delta", "param"]) == ["delta", "param"]
    assert spaces_of(open_node, merge_space_preference=["param"]) == ["param"]


def test_users_register_spaces_of_their_own(latent: MergeSpace) -> None:
    @merge_method(register=False)
    def encode(a: Parameter(Tensor, "weight")) -> Return(Tensor, "latent"):
        return a * 2

    @merge_method(register=False)
    def decode(a: Parameter(Tensor, latent)) -> Return(Tensor, "weight"):
        return a / 2

    assert numbers(decode(same_space(encode(W), encode(W))), strict_merge_space="weight") == {"x": 2.0}
    assert numbers(encode(W), strict_merge_space="latent") == {"x": 2.0}
    assert numbers(model(_space="latent", x=1.0)) == {"x": 1.0}
    with pytest.raises(MergeSpaceError, match=r"weight is declared.*latent is what decode takes as a"):
        run(decode(W))
    with pytest.raises(MergeSpaceError, match="latent is what encode returns"):
        run(same_space(encode(W), W))
    text = sd_mecha.serialize(sd_mecha.model("a.safetensors", merge_space="latent"), finalize=False)
    assert sd_mecha.deserialize(text).merge_space is latent


def test_a_symbol_without_spaces_takes_those_registered_later(latent: MergeSpace) -> None:
    assert spaces_of(same_space(model(_space="latent", x=1.0), model(_space="latent", x=1.0))) == ["latent"]
