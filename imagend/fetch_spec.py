"""What a job of kind fetch asks for: a model, by its source. What may be fetched at all stands in config.yaml. Pure."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from imagend.architecture import ModelKind
from imagend.fields import Frozen, ModelName, Planned, printable
from imagend.model_names import wanted
from imagend.record import MAX_TEXT, SHA256
from imagend.sources import WEIGHTS, host_of, is_civitai, is_hugging_face

VARIANT = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Fetch(Frozen):
    """A model, into models/. It makes no picture, needs no GPU, and is for clients with the right `fetch` only."""

    source: Annotated[str, AfterValidator(printable)] = Field(
        max_length=MAX_TEXT,
        description="A page or a download URL of Civitai, the number of a version, an AIR; the URL of a file or a "
        "repository of Hugging Face; another https URL of a .safetensors file.",
    )
    sha256: str | None = Field(
        None,
        pattern=SHA256,
        description="What the file must be; required where the source does not tell it (all but Civitai and Hugging "
        "Face).",
    )
    type: ModelKind | None = Field(None, description="What it is, if its tensors shall tell nothing else.")
    name: ModelName | None = Field(None, description="What to call it here; folders/may/precede. The file's own name.")
    variant: str | None = Field(
        None, pattern=VARIANT, description="Of a repository: the weights of that name, such as fp16."
    )
    notes: Annotated[str, AfterValidator(printable)] | None = Field(
        None, max_length=MAX_TEXT, description="For the model's record."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Fetch:
        try:
            host_of(self.source)
        except ValueError as error:
            raise ValueError(f"source: {error}") from None
        if not (is_civitai(self.source) or is_hugging_face(self.source)):
            if not urlsplit(self.source).path.endswith(WEIGHTS):
                raise ValueError("source: must end in .safetensors: nothing else is fetched from this host")
            if self.sha256 is None:
                raise ValueError("sha256: must be given: this host does not tell it in a known way")
        if self.name is not None and wanted(self.name).pin:
            raise ValueError("name: must not end in @ and a digest, which would pin it; leave that out")
        return self

    @property
    def host(self) -> str:
        """That is asked first."""
        return host_of(self.source)

    @property
    def pictures(self) -> tuple[str, ...]:
        return ()

    @property
    def planned(self) -> tuple[Planned, ...]:
        """Nothing is drawn."""
        return ()

    @property
    def chain_steps(self) -> tuple[str, ...]:
        """It is no chain."""
        return ()
