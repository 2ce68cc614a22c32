"""LoRAs as a job names them: tags as AUTOMATIC1111 reads them, and which layer gets which weight."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from imagend import lora
from imagend.config import Config
from imagend.daemon.recipe import complete
from imagend.errors import UnsupportedSetting
from imagend.generate_spec import Generate
from imagend.job import Ref
from imagend.models import Models

TE = {"text_encoder": 0.5, "text_encoder_2": 0.5}


@pytest.mark.parametrize(
    ("prompt", "rest", "found"),
    [
        ("a cat", "a cat", []),
        ("a <lora:ink> cat", "a  cat", [("ink", 1.0, None)]),
        ("<lora:sub/ink (v2) [x]:0.8>", "", [("sub/ink (v2) [x]", 0.8, None)]),
        ("<lora:ink:-.5>, <lora:oil:2>", ", ", [("ink", -0.5, None), ("oil", 2.0, None)]),
        ("<lora:ink:0.5:1>", "", [("ink", 1.0, TE)]),
        ("<lora:ink:unet=1:te=0.5>", "", [("ink", 1.0, TE)]),
        ("<lora:ink:te=0.5>", "", [("ink", 0.5, None)]),
        ("<lora:ink", "<lora:ink", []),
        ("<hypernet:ink:1>", "<hypernet:ink:1>", []),
    ],
)
def test_tags(prompt: str, rest: str, found: list[Any]) -> None:
    assert lora.tags(prompt) == (rest, found)


@pytest.mark.parametrize("tag", ["ink:much", "ink:1:1:1", "ink:3", "ink:lbw=XYZ", "ink:", "ink:nan", "ink:1e0"])
def test_no_tags(tag: str) -> None:
    with pytest.raises(ValueError, match="has a <lora:…>"):
        lora.tags(f"a <lora:{tag}> cat")


@given(
    st.text(alphabet="ab/ .", min_size=1).filter(lambda name: name == name.strip()),
    st.integers(-20, 20),
    st.integers(-20, 20),
)
def test_a_tag_is_read_as_it_was_written(name: str, te: int, unet: int) -> None:
    blocks = dict.fromkeys(lora.TEXT_ENCODERS, te / 10) if te != unet else None
    assert lora.tags(lora.tag(name, unet / 10, blocks)) == ("", [(name, unet / 10, blocks)])


@given(st.text(alphabet="<lora:>=te0.9-unet"))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        rest, found = lora.tags(text)
    except ValueError:
        return
    assert "<lora:" in text or (rest, found) == (text, [])


DOWN = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("blocks", "path", "weight"),
    [
        (None, DOWN, 0.7),
        ({"unet": 0.2}, DOWN, 0.2),
        ({"text_encoder": 0.2}, DOWN, 0.7),
        ({"unet": {"down": 0.2}}, DOWN, 0.2),
        ({"unet": {"up": 0.2}}, DOWN, 0.7),
        ({"unet": {"down": [0.2, 0.3]}}, DOWN, 0.2),
        ({"unet": {"down": [0.2, 0.3]}}, DOWN.replace("attentions.0", "attentions.1"), 0.3),
        ({"unet": {"down": {"block_1": [0.2, 0.3]}}}, DOWN.replace("attentions.0", "resnets.1"), 0.3),
        ({"unet": {"down": {"block_1": 0.2}}}, DOWN.replace("blocks.1", "blocks.2"), 0.7),
        ({"unet": {"down": {"block_1": [0.2]}}}, DOWN.replace("attentions.0", "attentions.1"), 0.2),
        ({"unet": {"mid": [0.2]}}, "mid_block.resnets.1.conv1", 0.2),
        ({"unet": {"mid": 0.2, "down": 0.2, "up": 0.2}}, "time_embedding.linear_1", 0.7),
        ({"unet": {"down": 0}}, "down_blocks.0.resnets.0.conv1", 0.0),
    ],
)
def test_which_layer_gets_which_weight(blocks: Any, path: str, weight: float) -> None:
    if blocks:
        lora.check_blocks(blocks)
    assert lora.weight_at(0.7, blocks, "unet", path) == weight


@pytest.fixture
def shapes() -> Any:
    return Models(REPOSITORY / "models").find("shapes-xl")


def completed(base: Any, config: Config | None = None, **fields: Any) -> Generate:
    spec = Generate.model_validate_json(json.dumps({"prompt": "a cat", "prompt_syntax": "a1111"} | fields))
    return complete(spec, Ref("alice", "0123456789abcdef0123"), config or Config(), base)


def test_tags_become_loras_once(shapes: Any) -> None:
    spec = completed(shapes, prompt="a cat<lora:ink:0.5>", loras=[{"name": "oil"}])
    assert spec.prompt == "a cat"
    assert [(one.name, one.weight) for one in spec.loras] == [("oil", 1.0), ("ink", 0.5)]
    again = completed(shapes, **spec.model_dump(mode="json", exclude_none=True))
    assert (again.prompt, again.loras) == (spec.prompt, spec.loras)


def test_only_a1111_has_tags(shapes: Any) -> None:
    spec = completed(shapes, prompt="a cat<lora:ink:0.5>", prompt_syntax="plain")
    assert (spec.prompt, spec.loras) == ("a cat<lora:ink:0.5>", ())


def test_an_image_types_affixes_may_hold_tags(shapes: Any) -> None:
    types = Config().image_types
    name, kind = next(iter(types.items()))
    affixes = kind.model_copy(update={"prompt_prefix": "<lora:ink:0.5>ink of ", "prompt_suffix": ""})
    config = Config().model_copy(update={"image_types": types | {name: affixes}})
    spec = completed(shapes, config, image_type=name)
    assert spec.prompt == "ink of a cat"
    assert [(one.name, one.weight) for one in spec.loras] == [("ink", 0.5)]
    with pytest.raises(UnsupportedSetting, match="twice"):
        completed(shapes, config, image_type=name, loras=[{"name": "ink.safetensors"}])
