"""What SnapshotEngine tells: of a save, of a commit, and of what went wrong behind the run."""

from dataclasses import dataclass

from lightning_align.checkpointing.manifest import Manifest


@dataclass(frozen=True)
class SaveResult:
    """What a save did to the thread that called it.

    Attributes:
        copied_bytes: Bytes of tensors that were copied.
        stall_s: Seconds from call to return.
        waited_s: Those of them that went into waiting for an earlier save to be written.
        skipped: Whether nothing was saved, because an earlier save was still being written.
        replaced: Names of earlier saves that this one took the place of; they will not be written.
    """

    copied_bytes: int = 0
    stall_s: float = 0.0
    waited_s: float = 0.0
    skipped: bool = False
    replaced: tuple[str, ...] = ()


@dataclass(frozen=True)
class Commit:
    """A checkpoint that is now durable.

    Attributes:
        path: Path or URL of its ``.ckpt`` file.
        manifest: Its manifest, with name, step, files and metadata.
        persist_s: Seconds from the start of writing to the commit.
    """

    path: str
    manifest: Manifest
    persist_s: float


@dataclass(frozen=True)
class SaveError:
    """Something that went wrong off the training path.

    Attributes:
        name: Checkpoint that was being written or deleted.
        step: The step it was saved at.
        error: The exception as it was raised on the other thread.
        message: All of it in a sentence, and what is intact.
    """

    name: str
    step: int
    error: BaseException
    message: str

    def __str__(self) -> str:
        return self.message
