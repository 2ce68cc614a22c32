"""Every error imagend raises on purpose, sorted by who must act.

ImagendError
├── Rejected     the sender, before the file was a job   → rejected/<name>.reason.json
│   ├── Unauthorized (Unsigned), Forbidden, Expired, TooLarge, UnknownJob
│   └── InvalidJob, RateLimited, QueueFull, CannotVerify
├── JobFailed    the sender, after the job was tried      → manifest: failed
│   ├── UnknownModel, ModelArriving, AmbiguousModel, UnusableModel, BrokenModel, BrokenWeights
│   ├── OtherWeights, ModelReplaced, RetiredModel, DownloadFailed
│   ├── NoControlNet, NoPreprocessor, NoIpAdapter, NoImageEncoder, NoUpscaler, NoDetector, NothingFound
│   ├── NoSafetyFilter, PictureWithheld
│   ├── UnknownDataset, BadDataset, NameTaken, TrainingTooLarge, TrainingFailed
│   ├── BadPicture, BadMask, UnknownReference, PromptTooLong, UnsupportedSetting, UnfitEmbedding, UnfitLora, NotFinite
│   └── OutOfMemory, MissingOutput, TimeLimit, TrainingTooLong, Bug
├── TryAgain     nobody: another attempt may do           → requeued, failed when attempts run out
│   └── WorkerDied, WorkerSilent, DeviceFailed, DaemonDied, NoSpace, DiskLost, ConnectionLost
└── Fatal        the operator                             → exit status, status.json
    ├── BadConfig, BadKeys, SpoolLocked, SpoolUnusable, HistoryUnusable, ResultDamaged
    └── UsageError, Unreachable

`Interrupt` is no error: it unwinds a job that was cancelled, and like trio's Cancelled it passes `except Exception`.

A class's docstring is its message, filled with the arguments it was raised with, and names the remedy. `code` and
`status` are what clients see (the HTTP status the error would have had).
"""

from __future__ import annotations

from typing import Any, ClassVar


class ImagendError(Exception):
    """{}"""

    code: ClassVar[str] = "INTERNAL"
    status: ClassVar[int] = 500
    exit_status: ClassVar[int] = 1

    def __init__(self, *args: object, detail: Any = None) -> None:
        super().__init__(*args)
        self.detail = detail

    def __str__(self) -> str:
        return " ".join((type(self).__doc__ or "{}").split()).format(*self.args)

    def envelope(self) -> dict[str, Any]:
        """`{"code", "message", "detail", "status"}`: how an error looks in every file a client reads."""
        return {"code": self.code, "message": str(self), "detail": self.detail, "status": self.status}


class Rejected(ImagendError):
    """{}"""

    client: str | None = None
    """who signed the file, once that is known"""


class Unauthorized(Rejected):
    """{}"""

    code, status = "UNAUTHORIZED", 401


class Unsigned(Unauthorized):
    """The file does not end in a signature, so nobody can be asked whether it is complete: its last bytes must be
    ,"signature":"<base64>"}} as `imagend submit` writes them. Write to a name that starts with a dot, then rename."""


class Forbidden(Rejected):
    """{}"""

    code, status = "FORBIDDEN", 403


class UnknownJob(Rejected):
    """No job {} of {} is known here. Those that have ended lie in their client's folder under outputs/."""

    code, status = "JOB_NOT_FOUND", 404


class Expired(Rejected):
    """{}"""

    code, status = "EXPIRED", 410


class TooLarge(Rejected):
    """The file has {} bytes; a job file may have at most {}. Shorten the prompt."""

    code, status = "PAYLOAD_TOO_LARGE", 413


class InvalidJob(Rejected):
    """{}"""

    code, status = "INVALID_PARAMETERS", 422


class RateLimited(Rejected):
    """More {} of {} came than {} a minute (jobs_per_minute in config.yaml). Send this one again in {} s, or ask the
    operator for more."""

    code, status = "RATE_LIMITED", 429


class QueueFull(Rejected):
    """{}, and the limit is {} (max_queued in config.yaml). Send this one again when some have ended, cancel one that
    waits (imagend cancel ID), or ask the operator for more."""

    code, status = "QUEUE_FULL", 503


class CannotVerify(Rejected):
    """imagend's host cannot check {} signatures now: {}. Tell its operator and send the job again, or sign with
    Ed25519."""

    code, status = "UNAVAILABLE", 503


class JobFailed(ImagendError):
    """{}"""


class UnknownModel(JobFailed):
    """No {} named {!r} under models/. Known are: {}. Put it there or correct its name in the job."""

    code, status = "MODEL_NOT_FOUND", 404


class NoControlNet(JobFailed):
    """There is no ControlNet for {} under models/controlnet/. Get one for SDXL, such as by
    `imagend fetch https://huggingface.co/{}`, or name another one in `model`."""

    code, status = "MODEL_NOT_FOUND", 404


class NoIpAdapter(JobFailed):
    """There is no IP-Adapter for this model under models/ipadapter/. Get one, such as by `imagend fetch
    https://huggingface.co/h94/IP-Adapter/blob/main/sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors`."""

    code, status = "MODEL_NOT_FOUND", 404


class NoImageEncoder(JobFailed):
    """The IP-Adapter {!r} reads what a CLIP vision encoder of {} {} makes of a picture, and there is none under
    models/clip_vision/. Put a folder with its config.json and model.safetensors there: the folder {}/image_encoder of
    https://huggingface.co/h94/IP-Adapter."""

    code, status = "MODEL_NOT_FOUND", 404


class NoPreprocessor(JobFailed):
    """There is no preprocessor for {} under models/preprocessors/. Get one, such as by
    `imagend fetch https://huggingface.co/{}`, or give a control picture instead."""

    code, status = "MODEL_NOT_FOUND", 404


class NoUpscaler(JobFailed):
    """There is no upscaler {!r} under models/upscale_models/. Known are: {}, and Lanczos. Correct its name, or get one,
    such as by `imagend fetch https://huggingface.co/{}`."""

    code, status = "MODEL_NOT_FOUND", 404


class NoDetector(JobFailed):
    """There is no detector of {} under models/detection/: to find by words takes one of boxes (GroundingDINO) and one
    of masks (SAM). Get one, such as by `imagend fetch https://huggingface.co/{}`, or give boxes or a picture as the
    mask."""

    code, status = "MODEL_NOT_FOUND", 404


class NothingFound(JobFailed):
    """In the picture nothing was found by {}, with threshold {:g} and text_threshold {:g}. Lower the thresholds, say it
    in other words, or give boxes or a picture as the mask."""

    code, status = "NOTHING_FOUND", 422


class NoSafetyFilter(JobFailed):
    """The operator wants pictures to be looked at before they are shown (safety in config.yaml), and that cannot be:
    {}. Tell the operator, and send the job again then."""

    code, status = "SAFETY_FILTER_MISSING", 503


class PictureWithheld(JobFailed):
    """What was painted is withheld by the safety filter: {}. Change the prompt, or paint from other seeds."""

    code, status = "WITHHELD", 403


class ModelArriving(JobFailed):
    """The {} {!r} is still being copied. Send the job again when `imagend models` lists it."""

    code, status = "MODEL_NOT_FOUND", 404


class AmbiguousModel(JobFailed):
    """Which {} is {!r}? There are {}. Name one of them, with its folder."""

    code, status = "INVALID_PARAMETERS", 422


class UnusableModel(JobFailed):
    """The {} {!r} cannot be used: it is {}. Name another one: imagend models lists them."""

    code, status = "MODEL_UNUSABLE", 500


class OtherWeights(JobFailed):
    """The {} {!r} is not the one that the job pins: its SHA-256 must begin with {}, and that of what lies there now is
    {}. Pin what is there (@{}), name it without a pin, or have the operator install the other one again."""

    code, status = "MODEL_REPLACED", 409


class ModelReplaced(JobFailed):
    """The {} {!r} was replaced while it was being read. Send the job again."""

    code, status = "MODEL_REPLACED", 409


class RetiredModel(JobFailed):
    """The {} {!r} is retired: {}. Name another one: imagend models lists them."""

    code, status = "MODEL_RETIRED", 410


class DownloadFailed(JobFailed):
    """Nothing was fetched from {}: {}."""

    code, status = "DOWNLOAD_FAILED", 502


class BrokenModel(JobFailed):
    """The model {!r} cannot be loaded: {}. Install its files again."""

    code, status = "MODEL_UNUSABLE", 500


class BrokenWeights(JobFailed):
    """The weight file {} cannot be used: {}. Only whole safetensors files are: get it again, or another one."""

    code, status = "MODEL_UNUSABLE", 500


class BadPicture(JobFailed):
    """The picture {} cannot be used: {}. {}."""

    code, status = "INVALID_PARAMETERS", 422


class BadMask(JobFailed):
    """The mask cannot be used: {}. {}."""

    code, status = "INVALID_PARAMETERS", 422


class UnknownReference(JobFailed):
    """No picture {!r} in reference/. {} Put it there or correct its name in the job."""

    code, status = "PICTURE_NOT_FOUND", 404


class UnknownDataset(JobFailed):
    """No dataset {!r} in reference/datasets/. Known are: {}. Put its pictures there or correct its name in the job."""

    code, status = "DATASET_NOT_FOUND", 404


class BadDataset(JobFailed):
    """The dataset {!r} cannot be trained on: {}. See all that is wrong with it: imagend datasets {}"""

    code, status = "INVALID_PARAMETERS", 422


class NameTaken(JobFailed):
    """There is a LoRA {!r} already, and it is never replaced. Give the new one another `name`, or have the operator
    remove that one first: imagend models remove {}"""

    code, status = "CONFLICT", 409


class TrainingTooLarge(JobFailed):
    """The device {} ran out of memory while it trained on pictures of about {}x{} pixels, {} at once, in every way that
    was tried ({}). Ask for a smaller train_batch_size, resolution or rank."""

    code, status = "OUT_OF_MEMORY", 507


class TrainingFailed(JobFailed):
    """The training was given up at step {}: its loss is no number. Lower the learning_rate, or set max_grad_norm to
    less."""

    code, status = "TRAINING_FAILED", 422


class PromptTooLong(JobFailed):
    """{} has {} tokens; at most {} are possible. Shorten it."""

    code, status = "INVALID_PARAMETERS", 422


class UnsupportedSetting(JobFailed):
    """{}"""

    code, status = "INVALID_PARAMETERS", 422


class UnfitEmbedding(JobFailed):
    """The embedding {!r} does not go with this model: {}. Leave it out of the prompt, or put one for SDXL into
    models/embeddings/."""

    code, status = "INVALID_PARAMETERS", 422


class UnfitLora(JobFailed):
    """The LoRA {!r} cannot be used with this model: {}. Leave it out or name another one: imagend models lists them."""

    code, status = "INVALID_PARAMETERS", 422


class NotFinite(JobFailed):
    """The picture cannot be shown: {}. {}."""

    code, status = "MODEL_UNUSABLE", 500


class OutOfMemory(JobFailed):
    """The device {} ran out of memory at {}x{} pixels, in every way that was tried ({}). Ask for a smaller width and
    height. {}."""

    code, status = "OUT_OF_MEMORY", 507


class MissingOutput(JobFailed):
    """The worker named the output {!r} but did not write it as told. This is a bug in imagend: please report it."""


class TimeLimit(JobFailed):
    """The job ran longer than {:g} s (time_limit_s in config.yaml). Ask for fewer pictures or steps."""

    code, status = "TIMEOUT", 504


class TrainingTooLong(JobFailed):
    """The training ran longer than {:g} s (train.time_limit_s in config.yaml). Ask for fewer max_train_steps, or for a
    smaller resolution, or ask the operator for more time."""

    code, status = "TIMEOUT", 504


class Bug(JobFailed):
    """imagend met a bug while painting ({}). The daemon's log has the details: please report it."""


class TryAgain(ImagendError):
    """{}"""


class DeviceFailed(TryAgain):
    """The device {} failed ({}). The worker was replaced. See the daemon's log of that time."""

    code, status = "WORKER_DIED", 500


class WorkerDied(TryAgain):
    """Worker {} died ({}) at attempt {}. See the daemon's log for its last words."""

    code, status = "WORKER_DIED", 500


class WorkerSilent(TryAgain):
    """Worker {} did not answer for {:g} s ({} in config.yaml) and was killed. See the daemon's log of that time."""

    code, status = "TIMEOUT", 504


class DaemonDied(TryAgain):
    """The daemon or its machine went down at attempt {}. See the log of that time."""

    code, status = "WORKER_DIED", 500


class NoSpace(TryAgain):
    """The pictures cannot be written: {}. The operator must make room under outputs/. Then send the job again."""

    code, status = "INSUFFICIENT_STORAGE", 507


class DiskLost(TryAgain):
    """The disk refused the picture {} and no longer has it; it is painted again. See the daemon's log of that time."""

    code, status = "INSUFFICIENT_STORAGE", 507


class ConnectionLost(TryAgain):
    """Nothing was fetched from {}: {}."""

    code, status = "DOWNLOAD_FAILED", 502


class Fatal(ImagendError):
    """{}"""

    exit_status = 70  # EX_SOFTWARE


class BadConfig(Fatal):
    """{}: {}. Correct it, then run: imagend check"""

    code, exit_status = "BAD_CONFIG", 78  # EX_CONFIG: systemd must not restart into the same mistake


class BadKeys(Fatal):
    """{}: {}. Correct the file; `man ssh-keygen`, section ALLOWED SIGNERS, describes its format."""

    code, exit_status = "BAD_KEYS", 78


class SpoolLocked(Fatal):
    """Another imagend (pid {}) already serves {}. Stop it first, or give this one another spool in config.yaml."""

    code, exit_status = "SPOOL_LOCKED", 69  # EX_UNAVAILABLE


class SpoolUnusable(Fatal):
    """{}: {}. Run: imagend check"""

    code, exit_status = "SPOOL_UNUSABLE", 74  # EX_IOERR


class ResultDamaged(Fatal):
    """{} is not as it was published: {}. Paint it again (imagend replay ID), and look for a failing disk."""

    code, exit_status = "RESULT_DAMAGED", 74


class HistoryUnusable(Fatal):
    """The history {} cannot be used: {}. Make it anew from what lies in outputs: imagend history --rebuild"""

    code, exit_status = "HISTORY_UNUSABLE", 74


class UsageError(Fatal):
    """{}"""

    code, exit_status = "USAGE", 64  # EX_USAGE


class Unreachable(Fatal):
    """{}"""

    code, exit_status = "UNREACHABLE", 69


class Interrupt(BaseException):
    """Unwinds a job between two steps because it was cancelled or the worker was told to stop. Let it pass."""
