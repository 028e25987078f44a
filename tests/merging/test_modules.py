"""Torch modules as inputs and as outputs of merges."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sd_mecha
from sd_mecha.errors import OptionError, OutputError, RecipeTypeError, ShapeError
from sd_mecha.storage.contract import TensorEntry
from sd_mecha.storage.modules import ModuleWriter, share_memory


class Net(nn.Module):
    """Parameters of two dtypes, buffers of both kinds, and tied weights."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4, dtype=dtype)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.randn(()))
        self.register_buffer("steps", torch.tensor(seed))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def snapshot(net: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def entry_of(tensor: torch.Tensor) -> TensorEntry:
    return TensorEntry(tuple(tensor.shape), tensor.dtype)


def average(*models: Any) -> Any:
    return sd_mecha.n_average(*[m if isinstance(m, nn.Module) else sd_mecha.model(m) for m in models])


class TestInput:
    def test_a_module_is_its_state_dict(self) -> None:
        net, other = Net(), snapshot(Net(1))
        found = sd_mecha.merge(average(net, other), output_dtype=None)
        expected = sd_mecha.merge(average(net.state_dict(), other), output_dtype=None)
        assert found.keys() == expected.keys() == {*net.state_dict(), "__metadata__"}
        assert all(torch.equal(found[key], expected[key]) for key in net.state_dict())

    def test_it_is_read_when_merging(self) -> None:
        net = nn.Linear(2, 2, bias=False)
        node = sd_mecha.model(net)
        nn.init.ones_(net.weight)
        net.to(torch.float64)  # its parameters have other memory from here on
        nn.init.constant_(net.weight, 3)
        assert sd_mecha.merge(node)["weight"].tolist() == [[3, 3], [3, 3]]

    def test_one_module_is_one_model(self) -> None:
        net = Net()
        assert sd_mecha.model(net) == sd_mecha.model(net)
        assert sd_mecha.model(net) != sd_mecha.model(Net())
        with sd_mecha.plan(sd_mecha.weighted_sum(net, sd_mecha.model(net))) as planned:
            assert [reader.name for reader in planned.readers] == ["module Net"]

    def test_it_stays_as_it_is(self) -> None:
        net = Net()
        before = snapshot(net)
        merged = sd_mecha.merge(sd_mecha.model(net), output_dtype=None)
        for key in before:
            merged[key].fill_(7)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())

    def test_it_is_a_fallback(self) -> None:
        net, model = Net(), snapshot(Net(1)) | {"scale": torch.tensor(torch.nan)}
        merged = sd_mecha.merge(sd_mecha.model(model), fallback_model=net, output_dtype=None)
        assert torch.equal(merged["scale"], net.scale)
        assert torch.equal(merged["body.bias"], model["body.bias"])

    def test_extra_state_is_left_out(self) -> None:
        class WithState(nn.Linear):
            def get_extra_state(self) -> object:
                return {"version": 1}

            def set_extra_state(self, state: object) -> None:
                pass

        net = WithState(2, 2)
        assert sd_mecha.merge(sd_mecha.model(net)).keys() - {"__metadata__"} == {"weight", "bias"}
        sd_mecha.merge(sd_mecha.model({"weight": torch.ones(2, 2), "bias": torch.ones(2)}), output=net)
        assert net.weight.tolist() == [[1, 1], [1, 1]]

    def test_text_cannot_hold_it(self) -> None:
        with pytest.raises(RecipeTypeError, match="module Linear"):
            sd_mecha.serialize(sd_mecha.model(nn.Linear(1, 1)), finalize=False)

    def test_a_module_without_data_is_refused(self) -> None:
        with pytest.raises(RecipeTypeError, match="meta device"):
            sd_mecha.merge(sd_mecha.model(nn.Linear(1, 1, device="meta")))
        with pytest.raises(RecipeTypeError, match="no data yet"):
            sd_mecha.merge(sd_mecha.model(nn.LazyLinear(1)))

    def test_the_functions_for_adapters_take_it(self) -> None:
        base, tuned = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
        adapter = sd_mecha.extract_adapter(tuned, base, rank=4, style="peft")
        result = sd_mecha.merge(sd_mecha.apply_adapter(base, adapter), output_dtype=None)
        assert torch.allclose(result["0.weight"], tuned[0].weight, atol=1e-3)


@pytest.mark.parametrize("threads", [0, 2])
class TestOutput:
    def test_results_are_in_the_parameters(self, threads: int) -> None:
        net = Net(dtype=torch.bfloat16)
        weight, scratch = net.body.weight, net.scratch
        a, b = snapshot(Net(1)), snapshot(Net(2))
        assert sd_mecha.merge(average(a, b), output=net, threads=threads) is net
        expected = sd_mecha.merge(average(a, b), output_dtype=None)
        for key, value in net.state_dict().items():
            assert torch.equal(value, expected[key].to(value.dtype)), key
        assert net.body.weight is weight
        assert weight.requires_grad
        assert weight.dtype == torch.bfloat16
        assert net.head.weight is net.embed.weight
        assert net.scratch is scratch

    def test_they_are_rounded_once(self, threads: int) -> None:
        net, model = nn.Linear(1, 1, bias=False), {"weight": torch.tensor([[1 + 2**-20]])}
        sd_mecha.merge(sd_mecha.model(model), output=net, threads=threads)
        assert torch.equal(net.weight, model["weight"])
        sd_mecha.merge(sd_mecha.model(model), output=net, output_dtype=torch.float16, threads=threads)
        assert net.weight.tolist() == [[1]]

    @pytest.mark.parametrize("shared", ["module", "state dict", "views", "literal"])
    def test_it_may_be_an_input(self, threads: int, shared: str) -> None:
        net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        own = net.state_dict()
        given = {
            "module": lambda: sd_mecha.model(net),
            "state dict": lambda: sd_mecha.model(own),
            "views": lambda: sd_mecha.model({key: value.view(9).view(3, 3) for key, value in own.items()}),
            "literal": lambda: sd_mecha.literal(own, merge_space="weight"),
        }[shared]()
        before = snapshot(net)
        crossed = sd_mecha.model({"0.weight": own["1.weight"], "1.weight": own["0.weight"]})
        recipe = sd_mecha.weighted_sum(given, crossed, alpha=0.25)
        sd_mecha.merge(recipe, output=net, threads=threads)
        for one, other in (("0.weight", "1.weight"), ("1.weight", "0.weight")):
            assert torch.allclose(net.state_dict()[one], before[one] * 0.75 + before[other] * 0.25)

    def test_a_failure_leaves_an_input_as_it_was(self, threads: int, caplog: pytest.LogCaptureFixture) -> None:
        net = Net()
        before = snapshot(net)
        with pytest.raises(RuntimeError, match="on purpose"):
            sd_mecha.merge(failing_at(net, "body.bias"), output=net, threads=threads)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        assert not caplog.records

    @pytest.mark.parametrize("shared", [False, True])
    def test_a_parameter_without_a_result_is_an_error(
        self, threads: int, shared: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        net = Net()
        before = snapshot(net)
        model: Any = snapshot(Net(1)) | {"body.weight": torch.full((4, 4), torch.nan)}
        recipe = sd_mecha.model(model)
        if shared:
            recipe = sd_mecha.add_difference(recipe, net, sd_mecha.model(before))
        with (
            caplog.at_level(logging.WARNING, "sd_mecha"),
            pytest.raises(
                OutputError, match=r"1 of its 5 tensors got no result, such as 'body\.weight'.*fallback_model"
            ),
        ):
            sd_mecha.merge(recipe, output=net, threads=threads)
        assert "'body.weight' left out of the result" in caplog.text
        changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
        assert "body.weight" not in changed
        assert bool(changed) is not shared
        assert ("the merge ended early: 4 of its 5 tensors are merged" in caplog.text) is not shared

    def test_what_another_model_fills_in_is_a_result(self, threads: int) -> None:
        net, model = Net(), snapshot(Net(1))
        recipe = sd_mecha.model(model | {"body.weight": torch.full((4, 4), torch.nan)})
        sd_mecha.merge(recipe, output=net, threads=threads, fallback_model=sd_mecha.model(snapshot(Net(2))))
        assert torch.equal(net.body.weight, Net(2).body.weight)
        assert torch.equal(net.body.bias, model["body.bias"])

    def test_another_name_of_a_tied_weight_may_be_dropped(self, threads: int) -> None:
        net, model = Net(), snapshot(Net(1))
        model["head.weight"] = torch.full((6, 4), torch.nan)
        sd_mecha.merge(sd_mecha.model(model), output=net, threads=threads)
        assert torch.equal(net.embed.weight, model["embed.weight"])


def failing_at(model: Any, wanted: str) -> Any:
    @sd_mecha.merge_method(register=False)
    def fails_at_a_key(
        a: sd_mecha.Parameter(torch.Tensor),  # type: ignore[valid-type]
        **kwargs: Any,
    ) -> sd_mecha.Return(torch.Tensor):  # type: ignore[valid-type]
        if kwargs["key"] == wanted and a.device.type != "meta":
            raise RuntimeError("on purpose")
        return a + 1

    return fails_at_a_key(sd_mecha.model(model))


def test_a_failure_midway_is_told(caplog: pytest.LogCaptureFixture) -> None:
    net, model = Net(), snapshot(Net(1))
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="on purpose"):
        sd_mecha.merge(failing_at(model, "body.bias"), output=net, threads=0)
    changed = [key for key, value in net.state_dict().items() if not torch.equal(value, before[key])]
    assert "embed.weight" in changed
    assert "body.bias" not in changed
    count = len(set(changed) - {"head.weight"})
    assert f"the merge ended early: {count} of its 5 tensors are merged" in caplog.text


class TestStrictness:
    def test_keys_must_be_those_of_the_module(self) -> None:
        net = Net()
        before = snapshot(net)
        model = snapshot(Net(1))
        del model["body.bias"]
        model["other"] = torch.ones(1)
        with pytest.raises(
            OutputError, match=r"lacks 1 keys of the result, such as 'other'.*lacks 1 keys of the module"
        ):
            sd_mecha.merge(sd_mecha.model(model), output=net)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())

    def test_one_name_of_tied_weights_is_enough(self) -> None:
        for left in ("embed.weight", "head.weight"):
            net, model = Net(), snapshot(Net(1))
            expected = model.pop(left)
            sd_mecha.merge(sd_mecha.model(model), output=net)
            assert torch.equal(net.embed.weight, expected)

    def test_the_first_name_of_tied_weights_counts(self) -> None:
        net, model = Net(), snapshot(Net(1))
        model["head.weight"] = torch.full((6, 4), 9.0)
        sd_mecha.merge(sd_mecha.model(model), output=net, threads=4)
        assert torch.equal(net.head.weight, model["embed.weight"])

    def test_shapes_are_compared(self) -> None:
        with pytest.raises(ShapeError, match=r"'weight' has shape \(2, 2\), the result \(2, 3\)"):
            sd_mecha.merge(sd_mecha.model({"weight": torch.ones(2, 3)}), output=nn.Linear(2, 2, bias=False))

    def test_floats_do_not_fit_into_integers(self) -> None:
        net = Net()
        with pytest.raises(OutputError, match="'steps' is int64 and cannot hold a result in float32"):
            sd_mecha.merge(sd_mecha.model(snapshot(Net(1)) | {"steps": torch.tensor(0.5)}), output=net)

    @pytest.mark.parametrize(
        ("net", "message"),
        [(nn.Linear(1, 1, device="meta"), "to_empty"), (nn.LazyLinear(1), "run it once")],
    )
    def test_a_module_without_data_is_refused(self, net: nn.Module, message: str) -> None:
        model = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
        with pytest.raises(OutputError, match=message):
            sd_mecha.merge(sd_mecha.model(model), output=net)

    def test_what_a_hook_makes_is_refused(self) -> None:
        net = nn.Linear(1, 1, bias=False)
        net.register_state_dict_post_hook(lambda module, state, prefix, local: state.update(extra=torch.ones(1)))
        with pytest.raises(OutputError, match="'extra' is no dense parameter or buffer"):
            sd_mecha.merge(sd_mecha.model({"weight": torch.ones(1, 1), "extra": torch.ones(1)}), output=net)

    @pytest.mark.parametrize(
        "option", [{"scaled_fp8": True}, {"checksums": True}, {"resume": True}, {"shard_size": "1GB"}]
    )
    def test_options_of_files_are_refused(self, option: dict[str, Any]) -> None:
        net = nn.Linear(1, 1, bias=False)
        with pytest.raises(OptionError, match=next(iter(option))):
            sd_mecha.merge(sd_mecha.model({"weight": torch.ones(1, 1)}), output=net, **option)


def test_a_file_goes_into_a_module(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    save_model(Net(3), str(tmp_path / "a.safetensors"))
    net = Net()
    sd_mecha.merge(sd_mecha.model(tmp_path / "a.safetensors"), output=net)
    assert all(torch.equal(value, Net(3).state_dict()[key]) for key, value in net.state_dict().items())


def test_results_are_copied_as_they_are_finished() -> None:
    net = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(4)])
    writer = ModuleWriter(net)
    entries = {key: entry_of(value) for key, value in net.state_dict().items()}
    writer.declare(entries, {})
    for key, entry in entries.items():
        writer.write(key, 0, memoryview(bytes(entry.nbytes)))
        writer.finished(key)
        assert not net.state_dict()[key].any()
    writer.commit()


def test_an_incomplete_result_is_refused_before_anything_is_copied() -> None:
    net = nn.Linear(2, 2)
    before = snapshot(net)
    writer = ModuleWriter(net, list(net.parameters()))
    entries = {key: entry_of(value) for key, value in net.state_dict().items()}
    writer.declare(entries, {})
    writer.write("weight", 0, memoryview(bytes(16)))
    writer.write("bias", 0, memoryview(bytes(4)))
    writer.finished("weight")
    with pytest.raises(OutputError, match="'bias' is incomplete"):
        writer.commit()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_memory_is_shared_whatever_the_view() -> None:
    whole = torch.zeros(8)
    array = whole.numpy()
    assert share_memory([torch.from_numpy(array[:4])], [torch.from_numpy(array[2:6])])
    assert not share_memory([torch.from_numpy(array[:4])], [torch.from_numpy(array[4:])])
    assert not share_memory([], [whole])
    assert not share_memory([torch.empty(0)], [torch.empty(0)])
    assert share_memory([torch.zeros(2), whole.t()], [torch.zeros(1), whole[7:]])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_module_on_the_gpu_stays_there(device: str) -> None:
    net, model = Net().cuda(), snapshot(Net(1))
    before = snapshot(net)
    sd_mecha.merge(average(net, model), output=net, merge_device=device)
    assert net.body.weight.is_cuda
    assert torch.allclose(net.body.weight, (before["body.weight"] + model["body.weight"].cuda()) / 2)
