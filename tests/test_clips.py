"""Videos: frames to maps, one after another, steadied; written whole or not at all."""

import json
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
from controlnet.preprocessors import clips, steady
from controlnet.preprocessors.condition import Condition
from controlnet.preprocessors.errors import InputError, OutputError, UsageError
from controlnet.preprocessors.images import read_image
from controlnet.preprocessors.skeleton import draw, to_text
from helpers import run
from PIL import Image
from test_skeleton import standing

FRAMES = 9


def frame(number):
    """A square that moves to the right by 6 pixels a frame."""
    image = np.full((96, 128, 3), 40, np.uint8)
    image[30:60, 10 + 6 * number : 40 + 6 * number] = (220, 120, 60)
    return image


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.avi"
    with clips.written(path, (128, 96), 12) as add:
        for number in range(FRAMES):
            add(frame(number))
    return path


def shown(path):
    return read_image(path.read_bytes(), str(path))


def shown_photo(folder):
    Image.fromarray(frame(0)).save(folder / "photo.png")
    return folder / "photo.png"


def left_edge(map_):
    return int(np.flatnonzero(map_.max(0) > 100)[0])


def test_a_video_is_read_as_it_was_written(clip):
    video = clips.open_clip(str(clip))
    assert (video.size, video.rate, video.count) == ((128, 96), 12, FRAMES)
    found = dict(video.frames())
    assert list(found) == list(range(FRAMES))
    assert all(np.abs(image.astype(int) - frame(k)).mean() < 4 for k, image in found.items())
    assert [k for k, _ in video.frames(every=4)] == [0, 4, 8]


def test_frames_become_maps_in_a_folder(clip, capsys):
    assert run("detect", "canny", clip, "--size", "128x96", "--json", "-q", "--preview", clip.with_name("s.png")) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    folder = clip.with_name("clip.canny")
    assert [line["frame"] for line in lines] == list(range(FRAMES))
    assert [line["output"] for line in lines] == [str(folder / f"{k:06d}.canny.png") for k in range(FRAMES)]
    edges = []
    for line in lines:
        with open(line["output"], "rb") as file:
            map_, text = read_image(file.read(), "x")
        record = json.loads(text["controlnet"])
        assert (
            record["source"] == "clip.avi" and record["frame"] == line["frame"] and len(record["source_sha256"]) == 64
        )
        edges.append(left_edge(map_[..., 0]))
    assert np.abs(np.diff(edges) - 6).max() <= 1  # it moves with the square
    assert clip.with_name("s.png").is_file()

    # What is there is left, or refused, or made again.
    assert run("detect", "canny", clip, "--size", "128x96", "-q") == 4
    (folder / "000004.canny.png").unlink()
    capsys.readouterr()
    assert run("detect", "canny", clip, "--size", "128x96", "-q", "--skip-existing", "--json") == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["frame"] for line in again if not line.get("skipped")] == [4] and len(again) == FRAMES


def test_frames_become_one_video(clip, capsys):
    out = clip.with_name("maps.mp4")
    assert run("detect", "canny", clip, "--size", "128x96", "-o", out, "-q", "--every", "2") == 0
    assert capsys.readouterr().out == f"{out}\n"
    video = clips.open_clip(str(out))
    assert (video.size, video.count, video.rate) == ((128, 96), 5, 6)
    edges = [left_edge(image[..., 0]) for _, image in video.frames()]
    assert np.abs(np.diff(edges) - 12).max() <= 2
    assert run("detect", "canny", clip, "-o", out, "-q") == 4
    assert sorted(path.name for path in clip.parent.iterdir()) == ["clip.avi", "maps.mp4"]


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
def test_ffmpeg_writes_what_every_browser_plays(tmp_path):
    with clips.written(tmp_path / "a.mp4", (128, 96), 12) as add:
        add(frame(0))
    assert b"avc1" in (tmp_path / "a.mp4").read_bytes()


def test_ffmpeg_is_given_what_it_needs(tmp_path, monkeypatch):
    """A stand-in takes the frames, and its words are the error when it fails."""
    program = tmp_path / "ffmpeg"
    program.write_text('#!/bin/sh\nfor out; do :; done\ncat > "$out"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(clips, "_count", lambda path: 2)
    with clips.written(tmp_path / "a.mp4", (128, 96), 12) as add:
        add(frame(0))
        add(frame(1)[:, ::-1])
    data = np.frombuffer((tmp_path / "a.mp4").read_bytes(), np.uint8).reshape(2, 96, 128, 3)
    assert (data[0] == frame(0)).all() and (data[1] == frame(1)[:, ::-1]).all()
    program.write_text("#!/bin/sh\ncat > /dev/null\necho no such codec >&2\nexit 1\n")
    with pytest.raises(OutputError, match="no such codec"), clips.written(tmp_path / "b.mp4", (128, 96), 12) as add:
        add(frame(0))
    program.write_text("#!/bin/sh\necho no such encoder >&2\nexit 1\n")  # it does not wait for frames
    video = clips.written(tmp_path / "b.mp4", (8, 8), 1)
    with pytest.raises(OutputError, match="no such encoder") as error, video as add:
        for _ in range(5000):
            add(np.zeros((8, 8, 3), np.uint8))
    assert error.value.hint and sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "ffmpeg"]


def test_a_video_that_fails_half_way_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), clips.written(tmp_path / "a.avi", (128, 96), 12) as add:
        add(frame(0))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args, code, said", [
    (["none.mp4"], 3, "no such file"), (["bad.mp4"], 3, "no video that can be read"),
    (["clip.avi", "-o", "-"], 2, "maps of a video"),
    (["clip.avi", "-o", "maps.webm"], 2, "-o maps.mp4"), (["clip.avi", "--every", "0"], 2, "--every 0"),
    (["a.png", "--every", "2"], 2, "are for videos"),
    (["clip.avi", "-o", "x.png"], 2, "go to a folder or a video"), (["a.png", "-o", "x.mp4"], 2, "written as PNG"),
    (["clip.avi", "-o", "clip.avi", "--overwrite"], 2, "is the video itself"),
    (["clip.avi", "--preview", "x.txt"], 2, "expected a .png"),
    (["clip.avi", "--processes", "2"], 2, "made by one process"), (["clip.avi", "--shard", "1/2"], 2, "one process"),
])  # fmt: skip
def test_mistakes_are_told_and_leave_nothing(clip, monkeypatch, capsys, args, code, said):
    monkeypatch.chdir(clip.parent)
    (clip.parent / "bad.mp4").write_bytes(b"no video")
    Image.fromarray(frame(0)).save("a.png")
    before = sorted(clip.parent.iterdir())
    assert run("detect", "canny", *args) == code
    err = capsys.readouterr().err
    assert said in err and "hint: " in err and "Traceback" not in err
    assert sorted(clip.parent.iterdir()) == before


def test_no_frames(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"")

    class Empty:
        isOpened = lambda self: True  # noqa: E731
        read = lambda self: (False, None)  # noqa: E731
        release = lambda self: None  # noqa: E731

    monkeypatch.setattr(cv2, "VideoCapture", lambda path: Empty())
    with pytest.raises(InputError, match="holds no frames"):
        clips.open_clip(str(tmp_path / "a.mp4"))


# Steadied.


def test_poses_tremble_less_and_follow(tmp_path):
    """Trembling is halved, a jump is followed at once, and who is lost for three frames stays."""
    rng = np.random.default_rng(0)
    calm, true = steady.Steady(), standing()
    still, shown = [], []
    for _ in range(30):
        noisy = true + np.column_stack([rng.normal(0, 0.004, (18, 2)), np.zeros(18)])
        still.append(noisy)
        shown.extend(calm.poses([noisy]))
    trembling = [np.abs(np.diff(np.stack(people)[5:, :, :2], axis=0)).mean() for people in (still, shown)]
    assert trembling[1] < 0.5 * trembling[0]
    assert np.abs(np.stack(shown)[5:].mean(0) - true).max() < 0.005
    moved = true + (0.08, 0, 0)
    (followed,) = calm.poses([moved])
    assert np.abs(followed - moved).max() < 1e-6
    without = moved.copy()
    without[4] = 0
    seen = [calm.poses([without])[0][4, 2] > 0 for _ in range(5)]
    assert seen == [True, True, True, False, False]
    held = [len(calm.poses([])) for _ in range(5)]
    assert held == [1, 1, 1, 0, 0] and len(calm.poses([moved, moved + (0.4, 0, 0)])) == 2


def test_two_people_keep_apart():
    calm = steady.Steady()
    left, right = standing() - (0.3, 0, 0), standing() + (0.3, 0, 0)
    calm.poses([left, right])
    first, second = calm.poses([right + (0.001, 0, 0), left])
    assert np.abs(first - right).max() < 0.002 and np.abs(second - left).max() < 0.002


def depth(near, top=255):
    low, high = float(near.min()), float(near.max())
    map_ = np.rint((near - low) / (high - low) * top).astype(np.uint8 if top == 255 else np.uint16)
    return Condition(map_, "depth", "x", {"normalisation": {"black": low, "white": high}})


@pytest.mark.parametrize("top", [255, 65535])
def test_depth_keeps_its_scale_when_something_near_comes_by(top):
    """A wall behind does not flicker, though the network's numbers change their scale from frame to frame."""
    rng = np.random.default_rng(1)
    scene = np.tile(np.linspace(1, 4, 64), (48, 1))
    calm, walls, plain = steady.Steady(), [], []
    for k in range(12):
        near = scene.copy()
        if k >= 4:
            near[20:30, 4 * k - 10 : 4 * k] = 7.0  # a hand before the camera
        condition = depth(near * rng.uniform(0.7, 1.4) + rng.uniform(-1, 1), top)
        made = calm(condition)
        assert made.map.dtype == condition.map.dtype and set(made.record["normalisation"]) == {"black", "white"}
        walls.append(made.map[40, 32] / top)
        plain.append(condition.map[40, 32] / top)
    assert np.abs(np.diff(walls)).max() < 0.35 * np.abs(np.diff(plain)).max()
    assert np.abs(np.diff(walls)).max() < 0.08


def test_a_pose_is_drawn_from_what_its_text_says():
    people = [standing()]
    made = steady.Steady()(Condition(draw(people, (128, 128)), "pose", "x", {}, people))
    assert (made.map == draw([np.array(p) for p in made.record["keypoints"]], (128, 128))).all()
    assert made.record["keypoints"] == to_text(people)
    with pytest.raises(UsageError):
        steady.check("canny")


def test_steady_depth_of_a_video(clip):
    for flag, name in (((), "plain.avi"), (("--steady",), "calm.avi")):
        assert run("detect", "depth", clip, "--size", "64", "-o", clip.with_name(name), "-q", *flag) == 0
    plain, calm = (
        np.stack([image for _, image in clips.open_clip(str(clip.with_name(name))).frames()]).astype(int)
        for name in ("plain.avi", "calm.avi")
    )
    assert plain.shape == calm.shape == (FRAMES, 64, 64, 3)
    change = [np.abs(np.diff(video[:, :16], axis=0)).mean() for video in (plain, calm)]
    assert change[1] < change[0]  # above the square nothing moves


def test_a_full_disk_leaves_no_video(clip, monkeypatch):
    """OpenCV does not say so: what can be read again is counted."""
    out = clip.with_name("maps.avi")
    assert run("detect", "canny", clip, "--size", "64", "-o", out, "-q") == 0
    before = out.read_bytes()
    monkeypatch.setattr(clips, "_count", lambda path: 3)
    assert run("detect", "canny", clip, "--size", "64", "-o", out, "-q", "--overwrite") == 4
    assert out.read_bytes() == before and len(list(clip.parent.iterdir())) == 2


def test_what_is_there_stays(clip, tmp_path):
    """With --skip-existing a foreign file, a video, and a map that would be made again; no map of another video or
    size."""
    mine = tmp_path / "mine.mp4"
    mine.write_bytes(b"mine")
    assert run("detect", "canny", clip, "-o", mine, "--skip-existing", "-q") == 0 and mine.read_bytes() == b"mine"
    folder = tmp_path / "maps"
    to = ("-o", f"{folder}/", "-q")
    assert run("detect", "canny", clip, "--size", "64", "--every", "4", *to) == 0
    (folder / "000004.canny.png").write_bytes(b"mine")
    assert run("detect", "canny", clip, "--size", "96x64", "--every", "4", "--skip-existing", *to) == 0
    assert shown(folder / "000000.canny.png")[0].shape == (64, 96, 3)
    assert (folder / "000004.canny.png").read_bytes() == b"mine"
    other = tmp_path / "other.avi"
    with clips.written(other, (128, 96), 12) as add:
        add(frame(3))
    assert run("detect", "canny", other, "--size", "96x64", "--skip-existing", *to) == 0
    assert json.loads(shown(folder / "000000.canny.png")[1]["controlnet"])["source"] == "other.avi"
    assert run("detect", "depth", clip, "--steady", "--skip-existing", "-q") == 2
    assert run("detect", "depth", shown_photo(tmp_path), "--steady", "-q") == 2
    assert run("detect", "canny", clip, "--steady", "-q") == 2  # no such flag


def test_several_videos_and_one_that_is_bad(clip, tmp_path, capsys):
    shutil.copy(clip, tmp_path / "two.avi")
    (tmp_path / "bad.avi").write_bytes(b"no video")
    to = ("--size", "64", "--every", "9", "-q")
    assert run("detect", "canny", tmp_path / "bad.avi", clip, tmp_path / "two.avi", "-o", f"{tmp_path}/m/", *to) == 6
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["clip.canny", "two.canny"]
    assert "1 of 3 maps failed" in capsys.readouterr().err
    (tmp_path / "b").mkdir()
    shutil.copy(clip, tmp_path / "b/clip.avi")
    assert run("detect", "canny", clip, tmp_path / "b/clip.avi", "-o", f"{tmp_path}/n/", *to) == 2
    assert run("detect", "all", clip, "--offline", "-o", f"{tmp_path}/all/", *to) == 6
    assert run("detect", "all", clip, "--offline", "-o", tmp_path / "all.mp4", *to) == 2
    assert run("detect", "inpaint", clip, "-o", tmp_path / "i.mp4", *to) == 2


def test_a_video_that_is_cut_off_is_told(clip, capsys, monkeypatch):
    real = clips.open_clip
    monkeypatch.setattr(clips, "open_clip", lambda path: replace(real(path), count=20))
    assert run("detect", "canny", clip, "--size", "64", "-q") == 0
    assert "only 9 of its 20 frames can be read" in capsys.readouterr().err


def test_names_that_opencv_cannot_take(tmp_path):
    path = tmp_path / "a\udcff.avi"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="not UTF-8"):
        clips.open_clip(str(path))


def test_a_video_in_place_of_a_picture(clip, capsys):
    assert run("check", clip, "--kind", "canny") == 3
    assert "is a video" in capsys.readouterr().err
    assert run("detect", "canny", clip.parent, "-o", f"{clip.parent}/m/") == 3


def test_frames_that_show_nobody_are_looked_at_once(clip, monkeypatch, capsys):
    """Their maps are black, and their number is told."""
    from controlnet.preprocessors.detectors.detector import Detector, Ready
    from controlnet.preprocessors.detectors.pose import drawn
    from controlnet.preprocessors.detectors.registry import find_detector

    looked = []

    def nobody(image, options):
        looked.append(options.allow_empty)
        return drawn([], image, options)

    row = find_detector("pose")
    monkeypatch.setattr(Detector, "ready", lambda self, options, *_, **__: Ready(row, options, nobody))
    assert run("detect", "pose", clip, "--size", "64", "-q") == 0
    assert looked == [True] * FRAMES and f"on {FRAMES} of {FRAMES} frames" in capsys.readouterr().err
    assert not shown(clip.with_name("clip.pose") / "000000.pose.png")[0].any()
