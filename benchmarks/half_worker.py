"""imagend.worker in bfloat16, for SDXL at full size on a CPU of 24 GB, where float32 would not fit. Benchmarks only.

Convolutions run channels last: in bfloat16 torch's other ones are ten to forty times slower on a CPU without AVX-512.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.update({"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"})

import torch

from imagend.worker import __main__, bases, pipelines

_own = bases.own


class Pipelines(pipelines.Pipelines):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.dtype = torch.bfloat16


def own(module: torch.nn.Module) -> None:
    _own(module)
    module.to(memory_format=torch.channels_last)


if __name__ == "__main__":
    pipelines.Pipelines = Pipelines  # type: ignore[misc]
    bases.own = own
    __main__.main()
