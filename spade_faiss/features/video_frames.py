"""Frames of videos as images: their records, and what is lost of a video that is damaged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.features.decoding import naming_file
from spade_faiss.features.pages import part_digest
from spade_faiss.features.pixels import Decoded
from spade_faiss.features.records import ImageRecord
from spade_faiss.features.video import Video
from spade_faiss.features.video_names import check_can_read, frame_name, is_video, split_time

# Of a frame: the decoder keeps several, which have 1.5 bytes a pixel; RGB of one that waits and of one that is used; Pillow's.
_PIXEL_BYTES = 24


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class VideoFrame(ImageRecord):
    """A frame of a video, which is an image.

    Args:
        video: the file; all frames of it that are read in one go share it.
        number: which of its frames it is, in the order in which they are shown.
        time_s: when it is shown, in seconds.
    """

    video: Video
    number: int
    time_s: float

    @property
    def decode_bytes(self) -> int:
        """About how many bytes of memory `decode` and the conversion to RGB take."""
        width, height = self.video.size
        return _PIXEL_BYTES * width * height

    @property
    def sha256(self) -> str:
        """What names the frame: the sha256 of the file's and of the time."""
        return part_digest(self.video.sha256, self.path)

    def decode(self, max_pixels: int) -> Decoded:
        """Return the upright pixels; raises as `Video.read`."""
        return Decoded(Image.fromarray(self.video.read(self.number, max_pixels)))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LostFrames(ImageRecord):
    """What of a video cannot be read: all of it, or the rest after the frames that are there."""

    reason: str


def frame_of(record: ImageRecord) -> VideoFrame | None:
    """The frame of a video that a record stands for; None if it stands for another image.

    Raises:
        InputError: for frames that cannot be read.
        DependencyError: if PyAV is not installed.
    """
    if isinstance(record, VideoFrame):
        return record
    if isinstance(record, LostFrames):
        raise InputError(record.reason)
    if (named := split_time(record.path)) is None:
        if is_video(record.path.name):
            raise InputError(f"it is a video; name one of its frames, such as {frame_name(record.path.name, '0.000')}")
        return None
    file, time = named
    check_can_read(file)
    video = Video(file, seeks=True)
    for number, written in enumerate(video.times()):
        if written == time:
            return VideoFrame(record.id, record.path, video=video, number=number, time_s=float(time))
    raise InputError(f"the video {file.name!r} has no frame at {time} s")


def list_frames(path: Path, every: int) -> tuple[list[tuple[Path, int, float]], Video, str]:
    """List the frames of a video that are going to be read.

    A file that cannot be read has none, as a truncated one may have fewer than it says: then there is a reason.

    Returns:
        Path, number and time in seconds of every n-th frame; the video that reads them; why frames are missing, or nothing.

    Raises:
        DependencyError: if PyAV is not installed.
    """
    check_can_read(path)
    video = Video(path, every=every)
    try:
        with naming_file(path):
            times = video.times()
    except InputError as error:
        return [], video, str(error)
    found = [(path.with_name(frame_name(path.name, times[k])), k, float(times[k])) for k in video.numbers]
    return found, video, video.ends_early
