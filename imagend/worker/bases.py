"""Base models, VAEs and ControlNets from disk: diffusers folders and single files. It judges none and keeps none."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from imagend.errors import BrokenModel, UnusableModel
from imagend.models import Model, Models
from imagend.worker.part import Part, own
from imagend.worker.shortage import is_out_of_memory
from imagend.worker.vae import upcast

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own import-time warnings; nobody here can act on them
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from diffusers import StableDiffusionXLPipeline as StableDiffusionXLPipeline
    from diffusers.loaders.single_file_utils import SingleFileComponentError, convert_controlnet_checkpoint
    from safetensors import SafetensorError
    from safetensors.torch import load_file

PROCESSOR = "preprocessor_config.json"
COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae")

# what the libraries raise on files that are missing, cut, of another shape or for another library
_BROKEN = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)
_BROKEN_FILE = (SafetensorError, SingleFileComponentError)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A base model, or a VAE alone, as loaded. `rest`: what a base's pipeline takes beside modules with weights."""

    model: Model
    parts: dict[str, Part]
    rest: dict[str, Any]
    config_folder: Path
    """where the configuration of its VAE is, for a VAE that comes as a single file"""

    @property
    def is_whole(self) -> bool:
        """Whether all its weights are in main memory, in no module's hands."""
        return all(part.weights is not None for part in self.parts.values())

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts.values())


def load_base(model: Model, models: Models, dtype: torch.dtype) -> Loaded:
    """Into main memory. Raises BrokenModel, UnusableModel, BrokenWeights, ModelReplaced; what memory and devices
    raise."""
    models.check(model)
    folder = models.config_folder(model)
    options: dict[str, Any] = {"local_files_only": True, "dtype": dtype, "add_watermarker": False}
    with errors_of(model):
        if model.is_file:
            without = {} if model.architecture.has_vae else {"vae": None}
            if model.architecture.inpainting:  # the configuration is that of one of 4 channels
                options["unet"] = _unet_for_inpainting(model, folder, dtype)
            pipe = StableDiffusionXLPipeline.from_single_file(model.path, config=str(folder), **options, **without)
        else:
            pipe = StableDiffusionXLPipeline.from_pretrained(model.path, use_safetensors=True, **options)
        parts = {name: _part(module) for name, module in pipe.components.items() if name in COMPONENTS and module}
    models.check_unchanged(model)
    rest = {name: part for name, part in pipe.components.items() if name not in COMPONENTS}
    rest["force_zeros_for_empty_prompt"] = pipe.config.force_zeros_for_empty_prompt
    rest["scheduler"] = _scheduler(model, pipe.scheduler)
    return Loaded(model, parts, rest, folder)


def _unet_for_inpainting(model: Model, folder: Path, dtype: torch.dtype) -> Any:
    where = {"config": str(folder), "subfolder": "unet", "local_files_only": True}
    return UNet2DConditionModel.from_single_file(model.path, in_channels=9, dtype=dtype, **where)


def load_vae(model: Model, base: Loaded, models: Models, dtype: torch.dtype) -> Loaded:
    """A VAE to go with a base. Raises as load_base() does."""
    models.check(model)
    with errors_of(model):
        if model.is_file:
            where = {"config": str(base.config_folder), "subfolder": "vae"}
            vae = AutoencoderKL.from_single_file(model.path, **where, local_files_only=True, dtype=dtype)
        else:
            vae = AutoencoderKL.from_pretrained(model.path, local_files_only=True, use_safetensors=True, dtype=dtype)
        part = _part(vae)
    models.check_unchanged(model)
    return Loaded(model, {"vae": part}, {}, model.path)


def load_controlnet(model: Model, unet: Any, models: Models, dtype: torch.dtype) -> Any:
    """A ControlNet to go with a base's UNet. Raises as load_base() does."""
    models.check(model)
    with errors_of(model):
        if model.is_file:
            net = _controlnet_of_file(load_file(model.path), unet).to(dtype)
        else:
            net = ControlNetModel.from_pretrained(model.path, local_files_only=True, use_safetensors=True, dtype=dtype)
        _part(net)
    models.check_unchanged(model)
    if any(_plain(net.config[name]) != _plain(unet.config[name]) for name in _SHARED):
        raise UnusableModel("ControlNet", model.name, "made for a model of another size than this job's")
    return net.eval()


_SHARED = ("block_out_channels", "layers_per_block", "cross_attention_dim", "projection_class_embeddings_input_dim")
"""what a ControlNet has as the UNet has it"""


def _controlnet_of_file(tensors: dict[str, torch.Tensor], unet: Any) -> Any:
    """A file does not say how its network is built: as the UNet's first half, but for what embeds the picture."""
    tensors = convert_controlnet_checkpoint(tensors, unet.config)
    first, inner = "controlnet_cond_embedding.conv_in.weight", r"controlnet_cond_embedding\.blocks\.\d*[13579]\.weight"
    widths = [len(tensor) for name, tensor in sorted(tensors.items(), key=_numbers) if re.fullmatch(inner, name)]
    net = ControlNetModel.from_unet(
        unet,
        conditioning_embedding_out_channels=(len(tensors[first]), *widths),
        load_weights_from_unet=False,
    )
    if (channels := tensors["conv_in.weight"].shape[1]) != net.config.in_channels:  # the UNet is one for inpainting
        net = ControlNetModel.from_config({**net.config, "in_channels": channels})
    net.load_state_dict(tensors)
    return net


def _numbers(item: tuple[str, Any]) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", item[0])]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _part(module: Any) -> Part:
    missing = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    if missing:
        raise ValueError(f"it lacks some of its weights, {missing[0]} among them")
    if isinstance(module, AutoencoderKL):
        upcast(module)
    own(module)
    return Part(module)


def _scheduler(model: Model, scheduler: Any) -> Any:
    """A checkpoint's own: SDXL's, for what its marks say that it predicts."""
    judged = model.architecture
    if not model.is_file or (judged.prediction_type is None and not judged.zero_snr):
        return scheduler
    marks: dict[str, Any] = {"prediction_type": judged.prediction_type or scheduler.config.prediction_type}
    if judged.zero_snr:
        marks |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return type(scheduler).from_config(scheduler.config, **marks)


@contextmanager
def reading(model: Model, models: Models, with_processor: bool = True) -> Iterator[None]:
    """A block that reads a folder as transformers saves it, checked before and not changed meanwhile; `with_processor`:
    the folder says how pictures are made ready, too. Raises BrokenModel, BrokenWeights, ModelReplaced."""
    models.check(model)
    if with_processor and not (model.path / PROCESSOR).is_file():
        raise BrokenModel(model.name, f"it lacks {PROCESSOR}")
    with errors_of(model):
        yield
    models.check_unchanged(model)


def network_of(kind: Any, model: Model) -> Any:
    """Of such a folder, a network of that class, in float32, in main memory, its weights not mapped."""
    network = kind.from_pretrained(model.path, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    own(network)
    return network.eval()


@contextmanager
def errors_of(model: Model) -> Iterator[None]:
    """What a library says of a model's files, as BrokenModel."""
    try:
        yield
    except torch.AcceleratorError:  # the device's trouble, not the files'
        raise
    except NotImplementedError:  # "Cannot copy out of meta tensor": the file had nothing to put there
        raise BrokenModel(model.name, "it lacks some of its weights") from None
    except (*_BROKEN, *_BROKEN_FILE) as error:
        if is_out_of_memory(error):
            raise
        raise BrokenModel(model.name, " ".join(str(error).split())[:300]) from None
