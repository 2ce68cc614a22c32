"""A kind that does what its prompt says."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from fakes import paint

from imagend.errors import NoSpace, UnsupportedSetting
from imagend.job import Artifact


def run(spec: dict[str, Any], context: Any) -> tuple[Artifact, ...]:
    context.progress("painting", 0, 1, 0, spec["num_inference_steps"])
    match spec["prompt"]:
        case "raise":
            raise ValueError(f"boom {spec['negative_prompt']}")
        case "refuse":
            raise UnsupportedSetting(f"not with me: {spec['negative_prompt']}")
        case "exit":
            sys.exit(3)
        case "exit at once":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            threading.Event().wait()
        case "babble":
            context.pipelines.connection.sendall(b"\x80\x04 this is not JSON\n")
            threading.Event().wait()
        case "endless line":
            while True:
                context.pipelines.connection.sendall(b"x" * 65536)
        case "lie about a path":
            return (paint(context.folder, 0, 0).model_copy(update={"file": "../../../../../../etc/hostname"}),)
        case "lie about a file":
            return (paint(context.folder, 0, 0).model_copy(update={"file": "0001.png"}),)
        case "lie about bytes":
            artifact = paint(context.folder, 0, 0)
            (context.folder / artifact.file).write_bytes(b"something else")
            return (artifact,)
        case "link":
            artifact = paint(context.folder, 0, 0)
            (context.folder / artifact.file).rename(context.folder / "elsewhere")
            (context.folder / artifact.file).symlink_to(context.folder / "elsewhere")
            return (artifact,)
        case "take time":
            for step in range(spec["num_inference_steps"]):
                context.progress("painting", 0, 1, step, spec["num_inference_steps"])
                time.sleep(0.01)  # stands for work
    try:
        return tuple(paint(context.folder, index, seed) for index, seed in enumerate(spec["seeds"]))
    except OSError as error:
        raise NoSpace(error.strerror) from None  # as the real one does
