"""Methods that compute nothing: they choose which input, or which keys, a result is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import promoted
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, T, merge_method, skip_key
from sd_mecha.extensions.model_configs import ModelConfig


@merge_method(tiling="select", reuse_outputs=False)
class fallback:
    """Take each key from `a`, and from `default` where `a` has none.

    Formula: `a[key]` if it exists and can be made, else `default[key]`. The operator `|` between recipe
    nodes.

    Args:
        a: the preferred model; of any kind, also a dict of numbers.
        default: what fills the gaps, of the same kind. Models of unknown architecture have no gaps: only the keys
            that all of them share are merged.

    Use when: a merge covers only some keys (a UNet, a few blocks) and the rest should come from a whole
    model.
    Cost: none; bytes are copied.
    Source: none needed.

    >>> import sd_mecha
    >>> keys = ["first_stage_model.quant_conv.bias", "first_stage_model.post_quant_conv.bias"]
    >>> a = sd_mecha.model({keys[0]: torch.ones(1)}, config="sd1-ldm")
    >>> b = sd_mecha.model(dict.fromkeys(keys, torch.zeros(1)), config="sd1-ldm")
    >>> merged = sd_mecha.merge(a | b, output_dtype=None)
    >>> merged[keys[0]], merged[keys[1]]
    (tensor([1.]), tensor([0.]))
    """

    @staticmethod
    def map_keys(builder: Any) -> None:
        for key in builder.out.keys():  # noqa: SIM118 (it is no mapping)
            builder[key] = builder.a.keys[key] | builder.default.keys[key]

    def __call__(
        self,
        a: Parameter(StateDict[T]),
        default: Parameter(StateDict[T]),
        **kwargs: Any,
    ) -> Return(T):
        sources = {"a": a, "default": default}
        ((name, (key,)),) = ((name, keys) for name, keys in kwargs["key_relation"].inputs.items() if keys)
        return sources[name][key]


@merge_method(tiling="select", reuse_outputs=False, is_conversion=True)
class convert_singleton:
    """Give every key of a config the same value: how a plain number becomes a parameter of a whole model.

    Formula: `result[k] = singleton["key"]` for every key k.

    Args:
        singleton: a literal of config `singleton-mecha`, made by `value_to_node` from a number, string or
            tensor.

    Use when: never by hand; a scalar in a recipe is wrapped by it.
    Cost: none.
    Source: none needed.

    >>> import sd_mecha
    >>> half = sd_mecha.value_to_node(0.5)
    >>> half.merge_method.identifier
    'convert_singleton'
    """

    @staticmethod
    def map_keys(builder: Any) -> None:
        for key in builder.out.keys():  # noqa: SIM118 (it is no mapping)
            builder[key] = builder.singleton.keys["key"]

    def __call__(self, singleton: Parameter(StateDict[T], model_config="singleton-mecha")) -> Return(T):
        return singleton["key"]


@merge_method(tiling="select", reuse_outputs=False)
def pick_component(
    a: Parameter(StateDict[T]),
    component: Parameter(str),
    **kwargs: Any,
) -> Return(T):
    """Keep the keys of one component of a model (its text encoder, its VAE, ...) and leave out all others.

    Formula: `result[k] = a[k]` for the keys k of the component.

    Args:
        a: a model of a known config.
        component: the name of the component, one of `config.components()`.

    Use when: components come from different merges: `pick_component(a, "vae") | b`.
    Cost: none; bytes are copied.
    Source: none needed.

    >>> import sd_mecha
    >>> model = sd_mecha.model({"x": torch.tensor([1.0])})  # of unknown architecture: one component
    >>> sd_mecha.merge(sd_mecha.pick_component(model, "keys"), output_dtype=None)["x"]
    tensor([1.])
    """
    if kwargs["key"] not in _component(a.model_config, component, "pick_component"):
        skip_key(kwargs["key"])
    return a[kwargs["key"]]


@merge_method(tiling="select", reuse_outputs=False)
def omit_component(
    a: Parameter(StateDict[T]),
    component: Parameter(str),
    **kwargs: Any,
) -> Return(T):
    """Leave out the keys of one component of a model and keep all others.

    Formula: `result[k] = a[k]` for the keys k outside the component.

    Args:
        a: a model of a known config.
        component: the name of the component, one of `config.components()`.

    Use when: a component should stay that of another model: `omit_component(a, "vae") | b`.
    Cost: none; bytes are copied.
    Source: none needed.

    >>> import sd_mecha
    >>> a, b = (sd_mecha.model({"x": torch.tensor([value])}) for value in (1.0, 2.0))
    >>> sd_mecha.merge(sd_mecha.omit_component(a, "keys") | b, output_dtype=None)["x"]
    tensor([2.])
    """
    if kwargs["key"] in _component(a.model_config, component, "omit_component"):
        skip_key(kwargs["key"])
    return a[kwargs["key"]]


def _component(config: ModelConfig, component: str, method: str) -> Any:
    """The keys of a component; a ValueError names the components there are."""
    components = config.components()
    if component not in components:
        known = ", ".join(components)
        raise ValueError(f"{method}: {config.identifier} has no component {component!r}; its components are {known}")
    return components[component].keys()


@merge_method(reuse_outputs=False)
def omit_non_finite(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
    """Leave out tensors that hold inf or nan, so that a fallback can replace them.

    Formula: `result[k] = a[k]` if every element of it is finite.

    Args:
        a: any model or intermediate result.

    Use when: a step may divide by zero or overflow: `omit_non_finite(step) | base`.
    Cost: one pass over a whole tensor.
    Source: none needed.

    >>> import sd_mecha
    >>> a = sd_mecha.model({"x": torch.tensor([1.0, float("nan")])})
    >>> base = sd_mecha.model({"x": torch.tensor([5.0, 6.0])})
    >>> recipe = sd_mecha.omit_non_finite(a) | base
    >>> sd_mecha.merge(recipe, omit_non_finite_inputs=False, output_dtype=None)["x"]
    tensor([5., 6.])
    """
    if not a.is_meta and not torch.isfinite(a).all():
        skip_key(kwargs["key"])
    return a


@merge_method(reuse_outputs=False)
def stack(*values: Parameter(Tensor)) -> Return(Tensor):
    """Put models on top of each other: one tensor per key, with a new first dimension that counts the models.

    Formula: `result[k][i] = values[i][k]`.

    Args:
        values: one or more models of the same kind and shapes.

    Use when: a custom method wants all models in a single tensor.
    Cost: whole tensors, copied once.
    Source: none needed.

    >>> stack.__wrapped__(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    tensor([[1., 2.],
            [3., 4.]])
    """
    if not values:
        raise ValueError("stack: got nothing to stack; expected at least one model")
    return torch.stack(promoted(*values))
