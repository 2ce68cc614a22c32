"""What a weight file is, from names and shapes alone: each kind of each family, as its authors publish it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weightfiles import LORA, SDXL, UNET, VAE, Shapes, header

from imagend.architecture import ModelKind, family
from imagend.recognise import identify, recognise
from imagend.recognise_folder import recognise_folder

WITHOUT_TEXT = {name: shape for name, shape in SDXL.items() if not name.startswith("conditioner")}
SD15: Shapes = {
    f"{UNET}input_blocks.0.0.weight": [320, 4, 3, 3],
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 768],
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": [768],
    "first_stage_model.decoder.conv_in.weight": [512, 4, 3, 3],
}
SD2 = {name.replace("transformer.text_model", "model"): shape for name, shape in SD15.items()} | {
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 1024]
}
REFINER: Shapes = {
    f"{UNET}input_blocks.0.0.weight": [384, 4, 3, 3],
    f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": [768, 1280],
    f"{UNET}label_emb.0.0.weight": [1536, 2560],
    "conditioner.embedders.0.model.ln_final.weight": [1280],
}
K = "transformer_blocks_0_attn2_to_k"
CONTROLNET = {"controlnet_cond_embedding.conv_in.weight": [1], "down_blocks.1.attn2.to_k.weight": [640, 2048]}
PEFT = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(
    ("shapes", "metadata", "expected"),
    [
        (
            SDXL,
            {},
            {"base": "sdxl", "has_vae": True, "channels": 320, "cross_attention_dim": 2048, "inpainting": False},
        ),
        (SDXL | {"v_pred": [0]}, {}, {"prediction_type": "v_prediction", "zero_snr": False}),
        (SDXL | {"v_pred": [0], "ztsnr": [0]}, {}, {"prediction_type": "v_prediction", "zero_snr": True}),
        (SDXL, {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        (SDXL, {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
        (SDXL, {}, {"prediction_type": None, "zero_snr": False, "native_size": 1024}),
        (SDXL | {f"{UNET}input_blocks.0.0.weight": [320, 9, 3, 3]}, {}, {"inpainting": True}),
        ({name: shape for name, shape in SDXL.items() if "first_stage" not in name}, {}, {"has_vae": False}),
    ],
)
def test_an_sdxl_checkpoint(shapes: Shapes, metadata: dict[str, str], expected: dict[str, object]) -> None:
    found = recognise(header(shapes, metadata), ModelKind.BASE)
    assert {key: getattr(found, key) for key in expected} == expected
    assert (found.kind, found.format) == (ModelKind.BASE, "single_file")


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (SD15, "an SD 1.5 checkpoint (cross-attention of 768): imagend paints with SDXL"),
        (SD2, "an SD 2 checkpoint (cross-attention of 1024): imagend paints with SDXL"),
        (REFINER, "SDXL's refiner"),
        ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": [1, 1]}, "an SD 3 checkpoint"),
        ({f"{UNET}double_blocks.0.img_attn.qkv.weight": [1, 1]}, "a Flux checkpoint"),
        ({"double_blocks.0.img_attn.qkv.weight": [1, 1]}, "a diffusion transformer"),
        ({f"{UNET}x": [1]}, "a checkpoint without the UNet"),
        ({f"{UNET}input_blocks.0.0.weight": []}, "a checkpoint without the UNet"),
        (WITHOUT_TEXT, "a checkpoint without its text encoders"),
        (SDXL | {f"{UNET}input_blocks.0.0.weight": [320, 8, 3, 3]}, "an SDXL checkpoint with 8 input channels"),
        ({name: shape for name, shape in SDXL.items() if "middle" not in name}, "a smaller relative of SDXL"),
        (SDXL | {"edm_mean": [4]}, "an SDXL checkpoint with EDM's noise schedule"),
        (SDXL | {"edm_vpred.sigma_max": []}, "an SDXL checkpoint with EDM's noise schedule"),
        (SDXL | {f"{UNET}out.2.weight.quant_state.bitsandbytes__nf4": [9]}, "a quantised checkpoint"),
        ({"input_blocks.0.0.weight": [320, 4, 3, 3]}, "a UNet alone"),
        ({"down_blocks.0.resnets.0.conv1.weight": [320, 320, 3, 3]}, "a UNet alone"),
        ({"text_model.embeddings.position_embedding.weight": [77, 768]}, "a text encoder alone"),
        (LORA, "a LoRA: it belongs in loras/"),
        (VAE, "a VAE: it belongs in vae/"),
        ({"a": [1], "b": [1]}, "nothing that imagend knows"),
        ({}, "nothing that imagend knows"),
    ],
)
def test_what_is_no_sdxl_checkpoint_says_what_it_is(shapes: Shapes, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  its text is compared below
        recognise(header(shapes), ModelKind.BASE)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("shapes", "metadata", "expected"),
    [
        (LORA, {}, ("kohya", "sdxl", 2048)),
        ({f"lora_unet_down_blocks_1_attentions_0_{K}.lora_down.weight": [4, 2048]}, {}, ("kohya", "sdxl", 2048)),
        ({f"{PEFT}.lora_A.weight": [4, 2048]}, {}, ("diffusers", "sdxl", 2048)),
        ({f"{PEFT}.lora.down.weight": [4, 2048]}, {}, ("diffusers", "sdxl", 2048)),
        ({f"{PEFT}.lora_A.weight": [4, 160]}, {}, ("diffusers", "sdxl", 160)),  # a small sibling's
        ({f"lora_unet_input_blocks_4_1_{K}.hada_w1_b": [4, 2048]}, {}, ("lycoris", "sdxl", 2048)),
        ({f"lora_unet_input_blocks_4_1_{K}.lokr_w1": [8, 8], "lora_te1_x.lokr_w1": [8, 8]}, {}, ("lycoris", "sdxl", 0)),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": [4, 1280]}, {}, ("kohya", "sdxl", 0)),
        ({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": [4, 1280]}, {}, ("diffusers", "sdxl", 0)),
        ({"lora_unet_mid_block_attentions_0_transformer_blocks_9_ff.lora_up.weight": [1, 1]}, {}, ("kohya", "sdxl", 0)),
        (
            {"lora_unet_conv_in.lora_down.weight": [4, 4, 3, 3]},
            {"ss_base_model_version": "sdxl_base_v1-0"},
            ("kohya", "sdxl", 0),
        ),
        ({"lora_unet_conv_in.lora_down.weight": [4, 4, 3, 3]}, {}, ("kohya", "", 0)),
    ],
)
def test_a_lora_for_sdxl(shapes: Shapes, metadata: dict[str, str], expected: tuple[str, str, int]) -> None:
    found = recognise(header(shapes, metadata), ModelKind.LORA)
    assert (found.format, found.base, found.cross_attention_dim) == expected


@pytest.mark.parametrize(
    ("shapes", "metadata", "says"),
    [
        ({f"lora_unet_down_blocks_0_attentions_0_{K}.lora_down.weight": [4, 768]}, {}, "a LoRA for SD 1.5 (cross-att"),
        ({f"lora_unet_down_blocks_0_attentions_0_{K}.lora_down.weight": [4, 1024]}, {}, "a LoRA for SD 2 (cross-att"),
        ({f"{PEFT}.lora_A.weight": [4, 768]}, {}, "a LoRA for SD 1.5 (cross-attention of 768)"),
        ({"unet.down_blocks.0.attentions.0.x.attn1.to_q.lora_A.weight": [4, 320]}, {}, "a LoRA for SD 1.5 or SD 2"),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": [4, 768]}, {}, "a LoRA for SD 1.5 or SD 2"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": [4, 9]}, {}, "a LoRA for a diffusion transformer"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": [4, 9]}, {}, "a LoRA for a diffusion tra"),
        ({"diffusion_model.joint_blocks.0.x.lora_A.weight": [4, 9]}, {}, "a LoRA for a diffusion transformer"),
        ({"lora_unet_joint_blocks_0_x.lora_down.weight": [4, 9]}, {}, "a LoRA for a diffusion transformer"),
        ({"lora_prior_unet_x.lora_down.weight": [4, 9]}, {}, "a LoRA for Stable Cascade"),
        ({"lora_unet_conv_in.lora_down.weight": [4, 4]}, {"ss_base_model_version": "sd_v1"}, "a LoRA for sd_v1, as"),
        (SDXL, {}, "a model: it belongs in checkpoints/"),
    ],
)
def test_what_is_no_lora_for_sdxl_says_what_it_is(shapes: Shapes, metadata: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  its text is compared below
        recognise(header(shapes, metadata), ModelKind.LORA)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("kind", "shapes", "form", "base"),
    [
        (ModelKind.VAE, VAE, "single_file", ""),
        (ModelKind.VAE, {f"first_stage_model.{name}": shape for name, shape in VAE.items()}, "single_file", ""),
        (ModelKind.VAE, VAE | {"decoder.up_blocks.0.resnets.0.conv1.weight": [1, 1, 1, 1]}, "diffusers", ""),
        (ModelKind.EMBEDDING, {"clip_l": [2, 768], "clip_g": [2, 1280]}, "single_file", "sdxl"),
        (ModelKind.EMBEDDING, {"text_encoders_0": [2, 768], "text_encoders_1": [2, 9]}, "diffusers", "sdxl"),
        (ModelKind.CONTROLNET, CONTROLNET, "diffusers", "sdxl"),
        (ModelKind.CONTROLNET, {"control_model.x.attn2.to_k.weight": [640, 2048]}, "single_file", "sdxl"),
        (
            ModelKind.IP_ADAPTER,
            {"image_proj.proj.weight": [8192, 1280], "ip_adapter.1.to_k_ip.weight": [640, 2048]},
            "plain",
            "sdxl",
        ),
        (
            ModelKind.IP_ADAPTER,
            {"image_proj.proj_in.weight": [1280, 1280], "ip_adapter.1.to_k_ip.weight": [640, 2048]},
            "plus",
            "sdxl",
        ),
        (ModelKind.CLIP_VISION, {"vision_model.embeddings.class_embedding": [1280]}, "transformers", ""),
        (ModelKind.UPSCALER, {"model.0.weight": [64, 3, 3, 3], "model.1.sub.0.RDB1.conv1.0.weight": [1]}, "esrgan", ""),
        (ModelKind.UPSCALER, {"conv_first.weight": [64, 3, 3, 3], "body.0.rdb1.conv1.weight": [1]}, "realesrgan", ""),
        (ModelKind.UPSCALER, {"body.0.weight": [64, 3, 3, 3], "body.1.weight": [64]}, "compact", ""),
        (ModelKind.UPSCALER, {"layers.0.residual_group.blocks.0.norm1.weight": [60], "x": [1]}, "other", ""),
    ],
)  # fmt: skip
def test_each_other_kind(kind: ModelKind, shapes: Shapes, form: str, base: str) -> None:
    found = recognise(header(shapes), kind)
    assert (found.kind, found.format, found.base) == (kind, form, base)


@pytest.mark.parametrize(
    ("kind", "shapes", "says"),
    [
        (ModelKind.VAE, {"decoder.conv_in.weight": [512, 16, 3, 3]}, "a VAE of 16 latent channels (Flux"),
        (ModelKind.VAE, {"decoder.conv_in.weight": [512, 16, 3, 3, 3]}, "a VAE for video"),
        (ModelKind.EMBEDDING, {"emb_params": [2, 768]}, "an embedding for SD 1.5 (768 wide)"),
        (ModelKind.EMBEDDING, {"emb_params": [2, 1024]}, "an embedding for SD 2 (1024 wide)"),
        (ModelKind.EMBEDDING, {"clip_g": [2, 1280]}, "an embedding for one text encoder alone"),
        (ModelKind.EMBEDDING, {"emb_params": []}, "an embedding for one text encoder alone"),
        (ModelKind.CONTROLNET, {"control_model.x.attn2.to_k.weight": [320, 768]}, "a ControlNet for SD 1.5"),
        (ModelKind.CONTROLNET, {"lora_controlnet": [0]}, "a Control-LoRA"),
        (ModelKind.CONTROLNET, CONTROLNET | {"task_embedding": [8, 320]}, "a ControlNet of many types in one"),
        (ModelKind.CONTROLNET, {"adapter.body.0.in_conv.weight": [1]}, "a T2I-Adapter"),
        (ModelKind.IP_ADAPTER, {"ip_adapter.1.to_k_ip.weight": [320, 768]}, "an IP-Adapter for SD 1.5"),
        (
            ModelKind.IP_ADAPTER,
            {"image_proj.proj.0.weight": [8, 512], "ip_adapter.1.to_k_ip.weight": [640, 2048]},
            "an IP-Adapter of another kind (for faces?): get a plain one or a Plus",
        ),
        (ModelKind.UPSCALER, SDXL, "a model: it belongs in checkpoints/"),
        (ModelKind.CLIP_VISION, {"text_model.x": [1]}, "a text encoder alone"),
    ],
)
def test_other_kinds_that_are_no_use_say_why(kind: ModelKind, shapes: Shapes, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  its text is compared below
        recognise(header(shapes), kind)
    assert str(caught.value).startswith(says)


NAMES = st.sampled_from(
    sorted({*SDXL, *LORA, *VAE, "emb_params", "clip_l", "ip_adapter.1.to_k_ip.weight", "lora_te_x.alpha"})
)


@given(st.dictionaries(NAMES | st.text(max_size=20), st.lists(st.integers(0, 9), max_size=5), max_size=8))
def test_any_header_is_judged_or_refused(shapes: Shapes) -> None:
    try:
        found = identify(header(shapes))
    except ValueError as error:
        said = str(error)
    else:
        said = found.kind.value if found else "unknown"
    assert said.isprintable()


@pytest.mark.parametrize(
    ("kind", "config", "says"),
    [
        (ModelKind.VAE, {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025}, None),
        (ModelKind.VAE, {"_class_name": "AutoencoderKL", "scaling_factor": 0.18215}, "a VAE for SD 1.5"),
        (ModelKind.VAE, {"_class_name": "AutoencoderKL", "latent_channels": 16}, "a VAE of 16 latent channels"),
        (ModelKind.VAE, {"_class_name": "AutoencoderTiny"}, "no VAE that imagend knows"),
        (ModelKind.VAE, {}, "no VAE that imagend knows"),
        (ModelKind.CONTROLNET, {"_class_name": "ControlNetModel", "cross_attention_dim": 2048}, None),
        (ModelKind.CONTROLNET, {"_class_name": "ControlNetModel", "cross_attention_dim": 768}, "for SD 1.5"),
        (ModelKind.CONTROLNET, {"_class_name": "ControlNetUnionModel"}, "a ControlNet of many types in one"),
        (ModelKind.PREPROCESSOR, {"architectures": ["DepthAnythingForDepthEstimation"]}, None),
        (ModelKind.PREPROCESSOR, {"architectures": ["VitPoseForPoseEstimation"]}, None),
        (ModelKind.PREPROCESSOR, {"architectures": ["GLPNForDepthEstimation"]}, "no preprocessor that imagend knows"),
        (ModelKind.DETECTOR, {"architectures": ["GroundingDinoForObjectDetection"]}, None),
        (ModelKind.DETECTOR, {"architectures": ["SamModel"]}, None),
        (ModelKind.DETECTOR, {"architectures": ["Sam2Model"]}, "no detector that imagend knows"),
        (ModelKind.CLIP, {"architectures": ["CLIPModel"]}, None),
        (ModelKind.CLIP, {"architectures": ["CLIPTextModelWithProjection"]}, None),
        (ModelKind.CLIP, {"architectures": ["CLIPVisionModelWithProjection"]}, "no CLIP text encoder that"),
        (ModelKind.SAFETY, {"architectures": ["ViTForImageClassification"]}, None),
        (ModelKind.SAFETY, {"architectures": ["CLIPForImageClassification"]}, None),
        (ModelKind.SAFETY, {"architectures": ["SiglipForImageClassification"]}, None),
        (ModelKind.SAFETY, {"architectures": ["ResNetForImageClassification"]}, "no safety classifier that imagend"),
        (ModelKind.CLIP_VISION, {"architectures": ["CLIPVisionModelWithProjection"]}, None),
        (ModelKind.CLIP_VISION, {"architectures": 7}, "no CLIP vision encoder that imagend knows"),
    ],
)  # fmt: skip
def test_a_part_in_a_folder_of_its_own(kind: ModelKind, config: dict[str, object], says: str | None) -> None:
    if says is None:
        assert recognise_folder("x", kind, {"config.json": config}).kind is kind
        return
    with pytest.raises(ValueError, match=says):
        recognise_folder("x", kind, {"config.json": config})


@pytest.mark.parametrize(
    ("metadata", "name", "expected"),
    [
        ({}, "ponyDiffusionV6XL", "Pony"),
        ({}, "waiIllustrious_v14", "Illustrious"),
        ({}, "hassakuXL_ilv2", "SDXL"),
        ({}, "film_grain", "SDXL"),
        ({"ss_sd_model_name": "noobaiXLVpred.safetensors"}, "style", "NoobAI"),
        ({"modelspec.title": "Animagine XL 4"}, "pony", "Animagine"),
    ],
)
def test_the_family_is_guessed_from_metadata_then_from_the_name(
    metadata: dict[str, str], name: str, expected: str
) -> None:
    assert family(metadata, name) == expected
