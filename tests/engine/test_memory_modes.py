"""Memory modes on a plain pipeline: the same bits where that is promised, and nothing left when they are taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine_conftest import load_plain

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from imagend.memory_plan import Mode  # noqa: E402
from imagend.prompt_tree import PromptSyntax  # noqa: E402
from imagend.worker.encode import encode  # noqa: E402
from imagend.worker.memory import Onload, Placement, can_stream, modules, tiled  # noqa: E402
from imagend.worker.text_encoder import Inversion  # noqa: E402

EXACT = [mode for mode in Mode if mode is not Mode.FP8]


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = load_plain()
    paint(pipe)  # transformers marks a module when it first runs
    return pipe


@pytest.fixture
def placement() -> Iterator[Placement]:
    placement = Placement("cpu")
    yield placement
    placement.release()


def paint(pipe: Any, **arguments: Any) -> Any:
    generator = torch.Generator("cpu").manual_seed(7)
    size = {"width": 64, "height": 64} | arguments
    embeddings = encode(pipe, "a red circle", None, PromptSyntax.PLAIN, None)
    return pipe(num_inference_steps=1, generator=generator, output_type="pt", **size, **embeddings).images


def state(pipe: Any) -> dict[str, Any]:
    """All that a mode could leave behind: every weight (which tensor, and where its bytes are), every attribute."""
    found: dict[str, Any] = {"components": list(pipe.components)}
    for name, module in modules(pipe).items():
        for path, tensor in (*module.named_parameters(), *module.named_buffers()):
            found[f"{name}.{path}"] = (id(tensor), tensor.dtype, tensor.device, tensor.data_ptr(), tensor.requires_grad)
        for path, part in module.named_modules():
            found[f"{name}.{path}."] = (id(part), sorted(part.__dict__), part.forward, len(part._forward_pre_hooks))
    return found


def bits(pipe: Any) -> dict[str, Any]:
    return {
        f"{name}.{path}": tensor.clone()
        for name, module in modules(pipe).items()
        for path, tensor in (*module.named_parameters(), *module.named_buffers())
    }


@pytest.mark.parametrize("mode", Mode)
def test_a_mode_that_is_taken_back_leaves_nothing(pipe: Any, placement: Placement, mode: Mode) -> None:
    before, weights, picture = state(pipe), bits(pipe), paint(pipe)
    placement.apply(pipe, mode)
    paint(pipe)
    placement.release()
    assert state(pipe) == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in bits(pipe).items())
    assert torch.equal(paint(pipe), picture)


@pytest.mark.parametrize("mode", EXACT)
def test_a_mode_that_only_moves_weights_paints_the_same_bits(pipe: Any, placement: Placement, mode: Mode) -> None:
    picture = paint(pipe)
    placement.apply(pipe, mode)
    assert torch.equal(paint(pipe), picture)
    assert torch.equal(paint(pipe), picture)  # the second one finds weights where the first one left them


def test_fp8_stores_the_unet_in_a_quarter_and_paints_nearly_the_same(pipe: Any, placement: Placement) -> None:
    picture, size = paint(pipe), stored(pipe.unet)
    placement.apply(pipe, Mode.FP8)
    assert stored(pipe.unet) < 0.3 * size
    difference = (paint(pipe) - picture).abs()
    assert 0 < difference.mean() < 0.05


def stored(module: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())


def test_modes_follow_each_other(pipe: Any, placement: Placement) -> None:
    before, picture = state(pipe), paint(pipe)
    for mode in (*Mode, *reversed(Mode)):
        placement.apply(pipe, mode)
        assert placement.holds(pipe, mode)
        assert mode is Mode.FP8 or torch.equal(paint(pipe), picture), mode
    placement.release()
    assert state(pipe) == before


def test_textual_inversions_are_encoded_in_every_mode(pipe: Any, placement: Placement) -> None:
    torch.manual_seed(0)
    inversion = Inversion("x", "0" * 64, (torch.randn(2, 64), torch.randn(2, 96)))

    def encoded() -> dict[str, Any]:
        return encode(pipe, "a x circle", None, PromptSyntax.PLAIN, None, split=lambda _: ["a ", inversion, " circle"])

    resident = encoded()
    for mode in Mode:
        placement.apply(pipe, mode)
        assert all(torch.equal(tensor, resident[name]) for name, tensor in encoded().items()), mode


@pytest.fixture
def adapt(pipe: Any) -> Iterator[Callable[..., None]]:
    """Give UNet and text encoder an adapter."""

    def adapt(**options: Any) -> None:
        torch.manual_seed(0)
        unet = peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "proj_in"], init_lora_weights=False, **options)
        text_encoder = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        pipe.unet.add_adapter(unet, adapter_name="x")
        pipe.text_encoder.add_adapter(text_encoder, adapter_name="x")

    yield adapt
    pipe.unload_lora_weights()


@pytest.mark.parametrize(
    ("mode", "dora"), [*((mode, False) for mode in Mode), (Mode.MODEL_OFFLOAD, True), (Mode.SEQUENTIAL, True)]
)
def test_with_loras_too(pipe: Any, placement: Placement, adapt: Callable[..., None], mode: Mode, dora: bool) -> None:
    bare = paint(pipe)
    adapt(use_dora=dora)
    assert can_stream(pipe) is not dora
    before, picture = state(pipe), paint(pipe)
    assert not torch.equal(picture, bare)
    placement.apply(pipe, mode)
    assert mode is Mode.FP8 or torch.equal(paint(pipe), picture)
    placement.release()
    assert state(pipe) == before
    assert torch.equal(paint(pipe), picture)
    pipe.unload_lora_weights()
    assert torch.equal(paint(pipe), bare)


@pytest.mark.parametrize(
    ("mode", "where"),
    [*((mode, "unet") for mode in Mode), (Mode.MODEL_OFFLOAD, "vae"), (Mode.SEQUENTIAL, "text_encoder")],
)
def test_a_failure_amid_a_mode_leaves_nothing(pipe: Any, placement: Placement, mode: Mode, where: str) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    before, picture = state(pipe), paint(pipe)
    placement.apply(pipe, mode)
    layer = {"text_encoder": pipe.text_encoder.encoder.layers[-1], "unet": pipe.unet.mid_block.resnets[1]}
    hook = layer.get(where, pipe.vae.decoder.conv_out).register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        paint(pipe)
    hook.remove()
    placement.release()
    assert state(pipe) == before
    assert torch.equal(paint(pipe), picture)


# What happens on a device, on one that is none: to bring a tensor there makes a copy of it


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Onload, "_fetch", lambda _, data: data.clone())


def layers(count: int) -> tuple[list[Any], Callable[[], list[bool]]]:
    """Some layers, and a look at which of them are away from home."""
    made = [torch.nn.Linear(2, 2) for _ in range(count)]
    home = [layer.weight.data_ptr() for layer in made]
    return made, lambda: [layer.weight.data_ptr() != at for layer, at in zip(made, home, strict=True)]


@pytest.mark.usefixtures("far")
def test_components_take_turns_on_the_device() -> None:
    made, away = layers(3)
    team: list[Onload] = []
    hooks = [Onload(torch.device("cpu"), list(layer.parameters()), team) for layer in made]
    for turn in (0, 1, 1, 2, 0):
        hooks[turn].pre_forward(made[turn])
        hooks[turn].post_forward(made[turn], None)
        assert away() == [number == turn for number in range(3)]
    hooks[0].detach_hook(made[0])
    assert not any(away())


@pytest.mark.usefixtures("far")
def test_a_layer_by_itself_leaves_when_it_has_run() -> None:
    (layer,), away = layers(1)
    hook = Onload(torch.device("cpu"), list(layer.parameters()))
    hook.pre_forward(layer)
    assert away() == [True]
    hook.post_forward(layer, None)
    assert away() == [False]


def test_what_does_not_arrive_whole_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,), away = layers(1)

    def fetch(_: Onload, data: Any) -> Any:
        if data.dim() == 1:
            raise torch.OutOfMemoryError("no room for the bias")
        return data.clone()

    monkeypatch.setattr(Onload, "_fetch", fetch)
    hook = Onload(torch.device("cpu"), [layer.weight, layer.bias])
    for _ in range(2):  # the second time, too: it is not taken for arrived
        with pytest.raises(torch.OutOfMemoryError):
            hook.pre_forward(layer)
        assert away() == [False]


def test_inputs_follow_the_weights() -> None:
    hook = Onload(torch.device("meta"), [])
    arguments, named = hook.pre_forward(torch.nn.Identity(), torch.ones(2), mask=torch.ones(2))
    assert arguments[0].is_meta
    assert named["mask"].is_meta


@pytest.mark.parametrize("mode", [Mode.MODEL_OFFLOAD, Mode.SEQUENTIAL])
@pytest.mark.parametrize("dora", [False, True])
def test_nothing_is_computed_with_weights_at_home(
    pipe: Any,
    placement: Placement,
    adapt: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    mode: Mode,
    dora: bool,
) -> None:
    """At home all weights are spoilt here; only those that are brought to the device are right."""
    adapt(use_dora=dora)
    picture = paint(pipe)
    placement.apply(pipe, mode)
    assert all(hasattr(module, "_hf_hook") for module in modules(pipe).values())  # where diffusers looks for a device
    right: dict[int, Any] = {}
    for module in modules(pipe).values():
        for tensor in (*module.parameters(), *module.buffers()):
            spoilt = torch.full_like(tensor.data, 3)
            right[spoilt.data_ptr()], tensor.data = tensor.data, spoilt
    monkeypatch.setattr(Onload, "_fetch", lambda _, data: right[data.data_ptr()])
    assert torch.equal(paint(pipe), picture)


def test_tiles_are_decoded_one_by_one_and_only_within_the_block(pipe: Any) -> None:
    whole = paint(pipe, width=128)
    sizes: list[tuple[int, ...]] = []
    hook = pipe.vae.decoder.register_forward_pre_hook(lambda _, arguments: sizes.append(tuple(arguments[0].shape[2:])))
    with tiled(pipe.vae, 64):
        pieces = paint(pipe, width=128)
    hook.remove()
    assert max(sizes) == (8, 8)
    assert len(sizes) > 1
    assert 0 < (pieces - whole).abs().mean() < 0.05
    assert torch.equal(paint(pipe, width=128), whole)
    with tiled(pipe.vae, None):
        assert torch.equal(paint(pipe, width=128), whole)
