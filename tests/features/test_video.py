"""Videos: which frames there are, what they are called, and that the right pixels come whoever asks in whatever order."""

from __future__ import annotations

import pickle
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.settings import Run
from spade_faiss.core.timing import Timings
from spade_faiss.features import video, video_names
from spade_faiss.features.datasets import ImageRecord, load_dataset, survey
from spade_faiss.features.pages import hash_image, hash_images
from spade_faiss.features.pictures import load_bytes, load_image
from spade_faiss.features.stream import FeatureStream
from spade_faiss.features.video import Video
from spade_faiss.features.video_frames import VideoFrame
from spade_faiss.features.video_names import split_time, write_times
from tests.support.backbones import tiny_backbone
from tests.support.missing import run_without
from tests.support.pictures import save_png
from tests.support.videos import CODECS, numbered, read_number, write_video

PLACED = Preprocess(resize_mode="stretch", size=64)


def numbers(records: Sequence[ImageRecord]) -> list[int]:
    return [read_number(load_image(record, PLACED).picture) for record in records]


def times(records: Sequence[ImageRecord]) -> list[float]:
    return [record.time_s for record in records if isinstance(record, VideoFrame)]


@pytest.mark.parametrize("suffix", CODECS)
def test_every_nth_frame_is_an_image(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"clip{suffix}", numbered(20))
    found = survey(path, Run(every=4))
    assert [record.id for record in found.records] == [f"clip{suffix}#t={0.4 * k:.3f}" for k in range(5)]
    assert times(found.records) == pytest.approx([0, 0.4, 0.8, 1.2, 1.6])
    assert numbers(found.records) == [0, 4, 8, 12, 16]
    assert len(survey(path).records) == 20
    assert all(load_bytes(record, PLACED) > 64 * 48 * 3 for record in found.records)


def test_another_process_reads_the_same_frames(tmp_path: Path) -> None:
    """Pickled, frames of a video share the video, and decode it anew."""
    write_video(tmp_path / "a.mp4", numbered(9))
    records = survey(tmp_path, Run(every=2)).records
    there: list[ImageRecord] = pickle.loads(pickle.dumps(records))
    assert [record.id for record in there] == [record.id for record in records]
    assert numbers(there) == numbers(records)
    videos = {id(record.video) for record in there if isinstance(record, VideoFrame)}
    assert len(videos) == 1


def test_avi_has_no_times_of_frames_and_they_come_in_order_all_the_same(tmp_path: Path) -> None:
    path = write_video(tmp_path / "b.avi", numbered(20), codec="libx264")
    records = survey(path).records
    assert numbers(records) == list(range(20))
    assert times(records) == pytest.approx([k / 10 for k in range(20)])


def test_a_variable_frame_rate_has_its_own_times(tmp_path: Path) -> None:
    at = [0, 40, 41, 42, 500, 510, 600, 601, 900, 1000]
    records = survey(write_video(tmp_path / "v.mp4", numbered(10), times_ms=at)).records
    assert [record.id for record in records] == [f"v.mp4#t={time / 1000:.3f}" for time in at]
    assert numbers(records) == list(range(10))


def test_times_are_written_with_as_many_digits_as_tell_them_apart() -> None:
    from fractions import Fraction

    assert write_times([Fraction(0), Fraction(1, 30), Fraction(12480, 1000)]) == ["0.000", "0.033", "12.480"]
    assert write_times([Fraction(k, 5000) for k in range(4)]) == ["0.000000", "0.000200", "0.000400", "0.000600"]
    assert write_times([]) == []


def test_threads_that_ask_in_any_order_get_their_frames_and_few_are_kept(tmp_path: Path) -> None:
    records = survey(write_video(tmp_path / "a.mp4", numbered(30))).records
    own = [record for record in records if isinstance(record, VideoFrame)]
    shared = own[0].video
    assert all(record.video is shared for record in own)
    found: dict[int, int] = {}
    # As the stream's threads do: in order, but for a few that overtake each other.
    mixed = [own[k] for start in range(0, 30, 3) for k in random.Random(start).sample(range(start, start + 3), 3)]

    def read(part: Sequence[VideoFrame]) -> None:
        for record in part:
            found[record.number] = read_number(shared.read(record.number))

    threads = [threading.Thread(target=read, args=(mixed[k::4],)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: k for k in range(30)}
    assert len(shared._ahead) <= shared._most_ahead
    backwards = [read_number(shared.read(k)) for k in (29, 3, 17, 0)]
    assert backwards == [29, 3, 17, 0]


def test_frames_are_decoded_once_and_those_that_nobody_wants_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(30))
    converted, real = [], video._upright

    def upright(frame: av.VideoFrame) -> video.Pixels:
        converted.append(frame.pts)
        return real(frame)

    monkeypatch.setattr(video, "_upright", upright)
    stream = FeatureStream(tiny_backbone(), Run(every=3), batch_size=4, timings=Timings())
    found = survey(path, Run(every=3))
    ids = [name for extracted in stream(found.root, found.records, "test") for name in extracted.batch.ids]
    assert ids == [record.id for record in found.records]
    assert len(converted) == len(set(converted)) == 10


def test_features_of_frames_are_those_of_pictures_of_them(tmp_path: Path) -> None:
    """The pixels of a frame are what a file without loss would give: nothing else comes into its features."""
    path, backbone = write_video(tmp_path / "a.mp4", numbered(6)), tiny_backbone()
    records = survey(path).records
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            save_png(frame.to_ndarray(format="rgb24").astype(np.uint8), tmp_path / "png" / f"{number}.png")

    def features(of: Path) -> list[np.ndarray]:
        found = survey(of)
        stream = FeatureStream(backbone, Run(), batch_size=4, timings=Timings())
        return [part.batch.embedding for part in stream(found.root, found.records, "test")]

    np.testing.assert_array_equal(np.concatenate(features(path)), np.concatenate(features(tmp_path / "png")))
    assert len(records) == 6


@pytest.mark.parametrize(("turn", "matrix"), [(3, (0, 1, -1, 0)), (1, (0, -1, 1, 0)), (2, (-1, 0, 0, -1))])
def test_a_video_of_a_phone_is_turned_upright(tmp_path: Path, turn: int, matrix: tuple[int, int, int, int]) -> None:
    picture = np.full((48, 64, 3), 40, np.uint8)
    picture[:16, :16] = 220  # the corner tells
    path = write_video(tmp_path / "a.mp4", [picture] * 3)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix is 40 bytes into the box
    unity = (1 << 16).to_bytes(4, "big")
    assert data[at : at + 4] == unity
    for place, value in zip((0, 4, 12, 16), matrix, strict=True):
        data[at + place : at + place + 4] = (value << 16).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    (record, *_) = survey(path).records
    expected = np.rot90(picture, turn)
    assert isinstance(record, VideoFrame)
    found = record.video.read(0)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() < 20
    load_image(record, PLACED)


def test_a_frame_is_found_by_its_name_alone(tmp_path: Path) -> None:
    """As the report finds the normal pictures of a bank."""
    records = survey(write_video(tmp_path / "a.mkv", numbered(20))).records
    for record in (records[0], records[7], records[-1]):
        named = load_image(ImageRecord("any", record.path), PLACED)
        own = load_image(record, PLACED)
        np.testing.assert_array_equal(named.picture, own.picture)
        assert named.sha256 == own.sha256 == hash_image(record.path)
    with pytest.raises(InputError, match=r"no frame at 9\.999 s"):
        load_image(ImageRecord("any", tmp_path / "a.mkv#t=9.999"), PLACED)


def test_names_and_hashes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(3))
    assert split_time(tmp_path / "a.mp4#t=0.100") == (path, "0.100")
    for name in ("a.mp4", "a.mp4#1", "a.png#t=0.100", "a.mp4#t=1", "a.mp4#t=-1.000"):
        assert split_time(tmp_path / name) is None
    (tmp_path / "odd.mp4#t=0.100").write_bytes(b"")
    assert split_time(tmp_path / "odd.mp4#t=0.100") is None, "a file that is really named so is itself"
    save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / "b.png")
    paths = [*(record.path for record in survey(path).records), tmp_path / "b.png"]
    assert hash_images(paths) == [hash_image(path) for path in paths]
    assert len({*hash_images(paths)}) == 4


def test_folders_and_labeled_sets_hold_videos(tmp_path: Path) -> None:
    save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / "in" / "a.png")
    write_video(tmp_path / "in" / "b" / "c.mp4", numbered(4))
    found = survey(tmp_path / "in", Run(every=2))
    assert [record.id for record in found.records] == ["a.png", "b/c.mp4#t=0.000", "b/c.mp4#t=0.200"]
    assert found.left_out.notices() == []
    for kind in ("good", "bad"):
        write_video(tmp_path / "set" / "test" / kind / "c.mp4", numbered(2))
    test = load_dataset(tmp_path / "set").test
    assert [(record.id, record.defective) for record in test] == [
        *((f"test/bad/c.mp4#t={time}", True) for time in ("0.000", "0.100")),
        *((f"test/good/c.mp4#t={time}", False) for time in ("0.000", "0.100")),
    ]
    assert isinstance(test[0], VideoFrame)
    assert replace(test[0], kind=None).video is test[0].video


class TestDamage:
    def frames(self, path: Path) -> tuple[list[int], list[tuple[str, str]]]:
        """Which frames give features, and what is skipped for what reason."""
        found = survey(path)
        stream = FeatureStream(tiny_backbone(), Run(max_skipped=100), batch_size=4, timings=Timings(), allow_none=True)
        kept = [
            read_number(image.picture) for extracted in stream(found.root, found.records, "test") for image in extracted.loaded
        ]
        return kept, [(item.id, item.reason) for item in stream.skipped]

    @pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".mov", ".avi"])
    def test_of_a_file_that_is_cut_off_what_is_there_counts(self, tmp_path: Path, suffix: str) -> None:
        rng = np.random.default_rng(0)
        # Noise around the number, so that a frame takes bytes.
        frames = [np.clip(frame + rng.normal(0, 12, frame.shape), 0, 255).astype(np.uint8) for frame in numbered(30)]
        path = write_video(tmp_path / f"a{suffix}", frames, gop=5)
        data = path.read_bytes()
        if suffix in (".mp4", ".mov"):  # the index is at the end: put it first, as cameras and `faststart` do
            with (
                av.open(str(path)) as source,
                av.open(str(tmp_path / f"b{suffix}"), "w", options={"movflags": "faststart"}) as target,
            ):
                stream = target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = stream
                        target.mux(packet)
            path = tmp_path / f"b{suffix}"
            data = path.read_bytes()
        path.write_bytes(data[: 2 * len(data) // 3])
        kept, skipped = self.frames(path)
        assert 10 <= len(kept) < 30
        assert kept == list(range(len(kept)))
        if suffix in (".mp4", ".mov", ".avi"):  # the others do not say how many frames they have
            assert any(path.name == name and "cut off" in reason for name, reason in skipped), skipped

    def test_damage_in_the_middle_ends_at_the_next_key_frame(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        frames = [np.clip(frame + rng.normal(0, 12, frame.shape), 0, 255).astype(np.uint8) for frame in numbered(30)]
        path = write_video(tmp_path / "a.mp4", frames, gop=5)
        with av.open(str(path)) as container:
            places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.pos is not None]
        start, size = sorted(place for place in places if place[1])[12]
        data = bytearray(path.read_bytes())
        data[start + 4 : start + size] = rng.bytes(size - 4)
        path.write_bytes(data)
        kept, skipped = self.frames(path)
        assert len(kept) + len(skipped) == 30
        assert 1 <= len(skipped) <= 10
        assert set(kept) >= {*range(5), *range(25, 30)}
        assert all("damaged" in reason for _, reason in skipped)

    def test_frames_that_do_not_come_cost_no_new_beginning(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each of them was looked for from the start of the file: an hour of damage took hours of decoding, squared."""
        path = write_video(tmp_path / "a.mp4", numbered(30))
        begun, real = [], video._frames

        def frames(*arguments: Any) -> Iterator[tuple[Any, bool]]:
            begun.append(arguments)
            for number, each in enumerate(real(*arguments)):
                if not 5 <= number < 15 and number < 24:
                    yield each

        monkeypatch.setattr(video, "_frames", frames)
        kept, skipped = self.frames(path)
        assert kept == [*range(5), *range(15, 24)]
        assert [name for name, _ in skipped] == [f"a.mp4#t={k / 10:.3f}" for k in (*range(5, 15), *range(24, 30))]
        assert all("damaged" in reason for _, reason in skipped)
        assert len(begun) == 1

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("empty.mp4", b""),
            ("text.mp4", b"this is no video at all, but some text that is long enough to be probed" * 50),
            ("head.mkv", b"\x1aE\xdf\xa3" + b"\x00" * 400),
            ("list.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"),
            ("join.avi", b"ffconcat version 1.0\nfile /etc/passwd\n"),
        ],
    )
    def test_what_is_no_video_is_skipped_with_a_reason(self, tmp_path: Path, name: str, content: bytes) -> None:
        """A playlist is not followed: neither to addresses nor to other files."""
        (tmp_path / name).write_bytes(content)
        kept, skipped = self.frames(tmp_path / name)
        assert kept == []
        assert [item for item, _ in skipped] == [name]
        assert "cannot be decoded" in skipped[0][1]

    def test_frames_larger_than_allowed_are_refused_before_they_are_decoded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_video(tmp_path / "a.mp4", numbered(3))
        monkeypatch.setattr(video, "MAX_PIXELS", 64 * 48 - 1)
        kept, skipped = self.frames(path)
        assert kept == []
        assert "64 x 48" in skipped[0][1]

    @pytest.mark.slow
    def test_flipped_bytes_crash_nothing(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(3)
        for suffix in CODECS:
            path = write_video(tmp_path / f"a{suffix}", numbered(12))
            data = path.read_bytes()
            for _ in range(20):
                damaged = bytearray(data)
                for place in rng.integers(0, len(data), 8):
                    damaged[place] = rng.integers(256)
                path.write_bytes(damaged)
                kept, skipped = self.frames(path)
                assert kept or skipped


def test_without_pyav_it_says_what_to_install(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered(2))
    save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / "a.png")
    code = """
from spade_faiss.features.datasets import survey
from spade_faiss.core.errors import DependencyError
found = survey(".")
print([record.id for record in found.records], found.left_out.notices())
try:
    survey("a.mp4")
except DependencyError as error:
    print(error)
"""
    done = run_without({"av"}, code, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "['a.png']" in first
    assert "pip install 'spade-faiss[video]'" in first
    assert "pip install 'spade-faiss[video]'" in second
    assert video_names.can_read_videos()
    assert Video(tmp_path / "a.mp4").numbers == range(2)
