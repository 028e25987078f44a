"""The same files as read by the programs that write them: `lycoris-lora` and `peft`, where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.adapters.makers import applied

LAYERS: dict[str, Callable[[], Any]] = {
    "matrix": lambda: nn.Linear(16, 32),
    "square": lambda: nn.Linear(16, 16),
    "kernel": lambda: nn.Conv2d(8, 16, 3),
    "pixel": lambda: nn.Conv2d(8, 16, 1),
}

LYCORIS: list[tuple[str, str, dict[str, Any]]] = [
    ("locon", "LoConModule", {}),
    ("locon", "LoConModule", {"use_tucker": True, "use_scalar": True}),
    ("locon", "LoConModule", {"weight_decompose": True, "rs_lora": True}),
    ("locon", "LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    ("loha", "LohaModule", {}),
    ("loha", "LohaModule", {"use_tucker": True, "weight_decompose": True}),
    ("lokr", "LokrModule", {"factor": 4, "decompose_both": True, "lora_dim": 1}),
    ("lokr", "LokrModule", {"factor": 2, "lora_dim": 2, "weight_decompose": True}),
    ("lokr", "LokrModule", {"factor": 2, "lora_dim": 1, "use_tucker": True}),
    ("lokr", "LokrModule", {"factor": 4, "full_matrix": True}),
    ("ia3", "IA3Module", {}),
    ("ia3", "IA3Module", {"train_on_input": True}),
    ("glora", "GLoRAModule", {}),
    ("diag_oft", "DiagOFTModule", {"rescaled": True}),
    ("diag_oft", "DiagOFTModule", {"constraint": 0.001}),
    ("boft", "ButterflyOFTModule", {"rescaled": True}),
    ("boft", "ButterflyOFTModule", {"constraint": 0.01}),
]


def effective(layer: Any) -> Tensor:
    """The weight of a layer as it acts: what it makes of unit vectors."""
    with torch.no_grad():
        if isinstance(layer, nn.Linear):
            units = torch.eye(layer.in_features)
            return (layer(units) - layer(0 * units)).mT
        count = layer.weight[0].numel()
        units = torch.eye(count).reshape(count, *layer.weight.shape[1:])
        return (layer(units) - layer(0 * units)).reshape(count, -1).mT.reshape(layer.weight.shape)


def disturb(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("module", "name", "options"), LYCORIS, ids=lambda value: "-".join(value) if isinstance(value, dict) else value
)
def test_what_lycoris_trains(module: str, name: str, options: dict[str, Any], layer: str) -> None:
    modules = pytest.importorskip(f"lycoris.modules.{module}")
    torch.manual_seed(0)
    target = LAYERS[layer]()
    base = {"layer.weight": target.weight.detach().clone()}
    trained = getattr(modules, name)("lora_unet_layer", target, 1.0, options.get("lora_dim", 4), 2.0, **{
        key: value for key, value in options.items() if key != "lora_dim"
    })  # fmt: skip
    disturb(trained)
    stored = {f"lora_unet_layer.{key}": value.detach().clone() for key, value in trained.state_dict().items()}
    trained.apply_to()
    trained.eval()
    expected = effective(target)
    assert not torch.allclose(expected, base["layer.weight"], atol=1e-4)
    torch.testing.assert_close(applied(base, stored)["layer.weight"], expected, rtol=1e-5, atol=2e-6)


PEFT: list[tuple[str, dict[str, Any], float | None]] = [
    ("LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": ["matrix", "kernel", "table"]}, 8),
    ("LoraConfig", {"r": 4, "lora_alpha": 4, "target_modules": ["matrix", "kernel"], "use_dora": True}, None),
    ("LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": ["matrix"], "lora_bias": True}, 8),
    ("LoHaConfig", {"r": 4, "alpha": 2, "target_modules": ["matrix", "kernel"]}, 2),
    ("LoHaConfig", {"r": 4, "alpha": 4, "target_modules": ["kernel"], "use_effective_conv2d": True}, None),
    ("LoKrConfig", {"r": 1, "alpha": 2, "target_modules": ["matrix", "kernel"], "decompose_both": True}, 2),
    ("LoKrConfig", {"r": 2, "alpha": 2, "target_modules": ["kernel"], "use_effective_conv2d": True}, None),
    ("IA3Config", {"target_modules": ["matrix"], "feedforward_modules": []}, None),
    ("IA3Config", {"target_modules": ["matrix"], "feedforward_modules": ["matrix"]}, None),
    ("OFTConfig", {"r": 0, "oft_block_size": 4, "target_modules": ["matrix", "kernel"]}, None),
    ("BOFTConfig", {"boft_block_size": 4, "target_modules": ["matrix"]}, None),
]


@pytest.mark.parametrize(("name", "options", "alpha"), PEFT, ids=[f"{name}-{n}" for n, (name, _, _) in enumerate(PEFT)])
@pytest.mark.filterwarnings("ignore")
def test_what_peft_trains(name: str, options: dict[str, Any], alpha: float | None) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.ModuleDict({"matrix": nn.Linear(16, 32), "kernel": nn.Conv2d(8, 16, 3), "table": nn.Embedding(10, 16)})
    base = {key: value.clone() for key, value in model.state_dict().items()}
    trained = peft.get_peft_model(model, getattr(peft, name)(**options))
    disturb(trained)
    stored = {key: value.clone() for key, value in peft.get_peft_model_state_dict(trained).items()}
    if alpha is not None:  # PEFT keeps it in a file of its own
        modules = {key.rpartition(".lo" if "lora" in key or "lokr" in key else ".hada")[0] for key in stored}
        stored |= {f"{module}.alpha": torch.tensor(float(alpha)) for module in modules}
    found = applied(base, stored)
    for key, expected in trained.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=2e-6)
    assert any(not torch.equal(found[key], base[key]) for key in base)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.filterwarnings("ignore")
def test_the_butterfly_of_peft(stages: int) -> None:
    """On the CPU, PEFT merges a single stage only; its permutations and rotations tell what it does on a GPU."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.ModuleDict({"matrix": nn.Linear(16, 6)})
    weight = model["matrix"].weight.detach().clone()
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=stages, target_modules=["matrix"])
    trained = peft.get_peft_model(model, config)
    disturb(trained)
    stored = {key: value.clone() for key, value in peft.get_peft_model_state_dict(trained).items()}
    layer = trained.base_model.model["matrix"]
    blocks = layer.boft_R["default"].detach()
    rotation = torch.eye(16)
    for order, stage in zip(layer.boft_P, blocks, strict=True):
        rotation = order @ torch.block_diag(*layer.cayley_batch(stage)) @ order.T @ rotation
    expected = weight @ rotation.T * layer.boft_s["default"].detach()
    found = applied({"matrix.weight": weight}, stored)["matrix.weight"]
    assert not torch.allclose(found, weight, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
