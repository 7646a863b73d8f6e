"""`cameras.json`: what is read, and what of other lenses and worlds is refused, by name. The rig that was written is the oracle."""

import json
import math

import pytest
import torch
from PIL import Image

from one2345pp.errors import InputError
from one2345pp.geometry.cameras import CameraRig


RIG = CameraRig.from_angles([0, 60, 120, 180, 240, 300], [20, -10] * 3, 0.6, 1.7)
FLIP = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
Z_UP = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
PIXELS = 100 / math.tan(0.3)  # focal length of `RIG` for pictures 200 wide


def read(folder, poses=RIG.camera_to_world, frame=None, **values):
    """What `load` makes of poses and other values of the file, and of its third frame."""
    frames = [{"file_path": f"r_{index}", "transform_matrix": pose.tolist()} for index, pose in enumerate(poses)]
    if frame:
        frames[2 % len(frames)] |= frame
    (folder / "cameras.json").write_text(json.dumps({**values, "frames": frames}))
    return CameraRig.load(folder)[0]


def moved(poses, scale=1.0, shift=(0.0, 0.0, 0.0)):
    poses = poses.clone()
    poses[:, :3, 3] = poses[:, :3, 3] * scale + torch.tensor(shift)
    return poses


# --- the form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rig",
    [
        CameraRig.from_angles([10, 50], [0, 20], 0.5, 2.0),
        CameraRig.from_angles([10, 50], [0, 20], torch.tensor([0.5, 0.7]), 2.0),
        CameraRig.orthographic([10, 50], [0, 20], 1.1),
        CameraRig.orthographic([10, 50], [0, 20], [1.1, 0.9]),
        CameraRig.cat([CameraRig.orthographic([10], [0], 1.1), CameraRig.from_angles([50], [20], 0.7, 2.0)]),
    ],
)
def test_round_trip(tmp_path, rig):
    rig.save(tmp_path / "cameras.json", ["a.png", "b.png"])
    loaded, names = CameraRig.load(tmp_path)
    assert names == ["a.png", "b.png"] and loaded == rig
    assert CameraRig.load(tmp_path / "cameras.json")[0] == rig


def test_the_width_of_an_orthographic_camera_is_blenders(tmp_path):
    """`ortho_scale` is the whole width, for the file or a frame, which may be of the other kind than the rest."""
    assert torch.allclose(read(tmp_path, ortho_scale=1.2).half_width, torch.tensor(0.6))
    rig = read(tmp_path, frame={"camera_angle_x": 0.5}, ortho_scale=1.2)
    assert rig.is_orthographic.tolist() == [True, True, False, True, True, True] and rig.fov[2] == 0.5
    rig = read(tmp_path, frame={"ortho_scale": 1.2}, camera_angle_x=0.5)
    assert rig.half_width[2] == pytest.approx(0.6) and rig.fov[1] == 0.5
    with pytest.raises(InputError, match="r_0: has camera_angle_x and ortho_scale"):
        read(tmp_path, ortho_scale=1.2, camera_angle_x=0.5)


def test_files_of_windows_are_read(tmp_path):
    """A byte order mark before the text, and parts of a path joined by the other slash."""
    text = json.dumps(
        {
            "camera_angle_x": 0.6,
            "frames": [{"file_path": ".\\views\\é.png", "transform_matrix": RIG.camera_to_world[0].tolist()}],
        },
        ensure_ascii=False,
    )
    (tmp_path / "cameras.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    rig, names = CameraRig.load(tmp_path)
    assert rig == RIG[0] and names == ["./views/é.png"]


FRAME = {"file_path": "left.png", "transform_matrix": RIG.camera_to_world[0].tolist()}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "frames"),
        ({"frames": []}, "frames"),
        ({"camera_angle_x": 0.5, "frames": [{"file_path": "left.png"}]}, "left.png: needs .* transform_matrix"),
        ({"camera_angle_x": 0.5, "frames": [[1, 2]]}, "frame 0: needs"),
        ({"frames": [FRAME]}, "left.png: has no camera_angle_x"),
        ({"frames": [{**FRAME, "fl_x": 400}]}, "left.png: has no camera_angle_x .*fl_x with w"),
        ({"camera_angle_x": 39.6, "frames": [FRAME]}, "left.png: camera_angle_x: got 39.6, expected radians"),
        ({"camera_angle_x": "wide", "frames": [FRAME]}, "left.png: camera_angle_x: got 'wide', expected a number"),
        ({"fl_x": 0, "w": 200, "frames": [FRAME]}, "left.png: fl_x: got 0, expected a positive"),
        ({"ortho_scale": -1, "frames": [FRAME]}, "left.png: ortho_scale: got -1, expected a positive"),
        (
            {"camera_angle_x": 0.5, "frames": [{**FRAME, "transform_matrix": (2 * torch.eye(4)).tolist()}]},
            "left.png: transform_matrix: its last row",
        ),
        (
            {"camera_angle_x": 0.5, "frames": [{**FRAME, "transform_matrix": RIG.camera_to_world[0].T.tolist()}]},
            "left.png: .*Transpose",
        ),
        (
            {
                "camera_angle_x": 0.5,
                "frames": [{**FRAME, "transform_matrix": torch.diag(torch.tensor([2.0, 2, 2, 1])).tolist()}],
            },
            "left.png: .*rotations",
        ),
        ({"camera_angle_x": 0.5, "frames": [{**FRAME, "transform_matrix": [[1, 2], [3, 4]]}]}, "left.png: .*shape"),
    ],
)
def test_unusable_files_are_refused_with_what_is_wrong(tmp_path, content, said):
    (tmp_path / "cameras.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=f"cameras.json: .*{said}"):
        CameraRig.load(tmp_path)


# --- lenses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"fl_x": PIXELS, "w": 200},
        {"fl_x": PIXELS, "fl_y": 1.008 * PIXELS, "w": 200, "h": 120, "cx": 100.9, "cy": 59.5},
        {"fl_y": PIXELS, "w": 200, "h": 200},
        {"camera_angle_y": 2 * math.atan(1.5 * math.tan(0.3)), "w": 200, "h": 300},
        {
            "camera_angle_x": 0.6,
            "camera_angle_y": 0.6,
            "fl_x": PIXELS,
            "fl_y": PIXELS,
            "w": 200,
            "h": 200,
            "cx": 100,
            "cy": 100,
        },
        {"camera_angle_x": 0.6, "k1": 0, "k2": 0.0, "k3": None, "k4": 0, "p1": 1e-5, "p2": 0, "camera_model": "OPENCV"},
        {"camera_angle_x": 0.6, "w": 64, "h": 64, "cx": 31.5, "cy": 31.5},  # the first pixel's centre is 0
    ],
)
def test_lenses_that_are_ours_are_taken(tmp_path, values):
    """Oracle: the rig, whose field of view every one of these says; for the whole file, or for one frame in other words."""
    torch.testing.assert_close(read(tmp_path, **values).fov, RIG.fov)
    wide = {"camera_angle_x": 0.9, "fl_x": 100 / math.tan(0.45), "w": 200}
    torch.testing.assert_close(
        read(tmp_path, frame={**dict.fromkeys(("k1", "w")), **values}, **wide).fov[2], RIG.fov[2]
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cx": 120, "w": 200, "h": 200}, "cx: is 120, expected the middle of the picture, 100"),
        ({"cy": 98, "w": 200, "h": 200}, "cy: is 98, expected .* 100.*Crop"),
        ({"cx": 100}, "has cx, but no w.*Add"),
        ({"fl_x": PIXELS, "fl_y": 1.02 * PIXELS, "w": 200, "h": 200}, "fl_y and w .*pixels are square"),
        ({"fl_x": 1.1 * PIXELS, "w": 200}, "by camera_angle_x .* 34.38 degrees wide, by fl_x and w 31.41"),
        ({"camera_angle_y": 0.7, "w": 200, "h": 200}, "camera_angle_y, w and h"),
        *(
            ({key: -0.02}, f"{key} = -0.02: the lens distorts. Undistort")
            for key in ("k1", "k2", "k3", "k4", "p1", "p2")
        ),
        ({"k1": 0.1, "p2": 0.01}, "k1 = 0.1, p2 = 0.01"),
        ({"camera_model": "OPENCV_FISHEYE"}, "OPENCV_FISHEYE.*Undistort"),
        ({"is_fisheye": True}, "fisheye"),
        ({"cx": "middle", "w": 200}, "cx: got 'middle', expected a number"),
    ],
)
def test_lenses_that_are_not_ours_are_refused(tmp_path, values, said):
    """For the file its first frame is named, for a frame that."""
    with pytest.raises(InputError, match=f"cameras.json: r_0: .*{said}"):
        read(tmp_path, camera_angle_x=0.6, **values)
    with pytest.raises(InputError, match=f"cameras.json: r_2: .*{said}"):
        read(tmp_path, frame={"camera_angle_x": 0.6, **values}, camera_angle_x=0.6)
    if values.keys() & {"cx", "cy", "k1", "p2"}:
        with pytest.raises(InputError, match=f"r_0: .*{said}"):
            read(tmp_path, ortho_scale=1.0, **values)


def test_the_picture_says_its_size_if_the_file_does_not(tmp_path):
    """Oracle: lens values in pixels of pictures that are 200 by 120, and one on its side."""
    for index in range(6):
        Image.new("RGB", (200, 120)).save(tmp_path / f"r_{index}.PNG")
    turned = Image.new("RGB", (120, 200)).getexif()
    turned[0x0112] = 6
    Image.new("RGB", (120, 200)).save(tmp_path / "turned.jpg", exif=turned)
    frame = {"file_path": "turned"}
    torch.testing.assert_close(read(tmp_path, frame=frame, fl_x=PIXELS, cx=100, cy=60).fov, RIG.fov)
    with pytest.raises(InputError, match="r_0: cy: is 100, expected .* 60"):
        read(tmp_path, frame=frame, fl_x=PIXELS, cx=100, cy=100)


# --- worlds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rig", [RIG, RIG[1:2], CameraRig.named("zero123plus-v1.1"), CameraRig.named("zero123plus-v1.2")]
)
def test_other_conventions_of_matrices_are_told(tmp_path, rig):
    for poses, said in (
        (rig.world_to_camera, "were world-to-camera. Invert the matrices: "),
        (rig.camera_to_world @ FLIP, "of OpenCV's axes .*Negate their second and third columns: "),
        (FLIP @ rig.world_to_camera, "world-to-camera with OpenCV's axes .*Invert .* then negate"),
    ):
        with pytest.raises(InputError, match=rf"cameras.json: r_\d: its camera looks past .*{said}"):
            read(tmp_path, poses, camera_angle_x=0.6)


@pytest.mark.parametrize(
    ("poses", "lens", "said"),
    [
        (moved(RIG.camera_to_world, 2.6), {"camera_angle_x": 0.6}, r"cover 11% of the picture.*Scale the world"),
        (moved(RIG.camera_to_world, 4), {"camera_angle_x": 0.6}, r"cover 4.5% of the picture"),
        (
            moved(RIG.camera_to_world, 0.4),
            {"camera_angle_x": 0.6},
            r"cover 966% of the picture, and no less of others",
        ),
        (moved(RIG.camera_to_world, 0.1), {"camera_angle_x": 0.6}, r"cover far more than all of the picture"),
        (RIG.camera_to_world, {"ortho_scale": 3.0}, r"cover 8.7% of the picture"),
        (RIG.camera_to_world, {"ortho_scale": 0.3}, r"cover 873% of the picture"),
        (Z_UP @ moved(RIG.camera_to_world, 2.6), {"camera_angle_x": 0.6}, r"cover 11% .*\+Z up: here \+Y is up"),
        (
            moved(RIG.camera_to_world, 2.6, (0, 0.6, 0)),
            {"camera_angle_x": 0.6},
            r"cover .* look at \(0, 0.6, 0\): move that",
        ),
        (moved(RIG.camera_to_world, 1, (0, 0, 5)), {"camera_angle_x": 0.6}, r"sees nothing of .* look at \(0, 0, 5\)"),
        (moved(RIG.camera_to_world, 1, (3, 0, 0)), {"ortho_scale": 1.0}, r"sees nothing of .* look at \(3, 0, 0\)"),
    ],
)
def test_other_worlds_are_told(tmp_path, poses, lens, said):
    with pytest.raises(InputError, match=rf"cameras.json: r_\d: .*{said}"):
        read(tmp_path, poses, **lens)


def test_a_frame_that_looks_elsewhere_is_named(tmp_path):
    """One of six, though the others are right: its matrix is another's inverse, or it looks into the sky."""
    for pose in (RIG.world_to_camera[1], CameraRig.from_angles([0], 80, 0.6, 4.0).camera_to_world[0] @ FLIP):
        with pytest.raises(InputError, match="r_2: its camera sees nothing of the sphere.*leave the frame out.$"):
            read(tmp_path, frame={"transform_matrix": pose.tolist()}, camera_angle_x=0.6)


def turned(poses, right: float, up: float):
    """Cameras that look so many degrees to their right, and up."""
    x, y = math.radians(up), -math.radians(right)
    about_x = torch.tensor([[1, 0, 0], [0, math.cos(x), -math.sin(x)], [0, math.sin(x), math.cos(x)]])
    about_y = torch.tensor([[math.cos(y), 0, math.sin(y)], [0, 1, 0], [-math.sin(y), 0, math.cos(y)]])
    poses = poses.clone()
    poses[:, :3, :3] = poses[:, :3, :3] @ about_y @ about_x
    return poses


@pytest.mark.parametrize("fov", [10, 20, 30, 45, 60, 90])
@pytest.mark.parametrize("fill", [0.42, 0.7, 1.0, 1.4, 1.9])
def test_cameras_of_our_world_are_never_refused(tmp_path, fov, fill):
    """Any side, one camera or many, a sphere that fills from less than half to nearly twice the picture, looked at off its middle."""
    fov = math.radians(fov)
    tangent = fill * math.tan(fov / 2)  # of the angle that the sphere's radius spans
    distance = 0.5 * math.sqrt(1 + 1 / tangent**2)
    reach = math.degrees(math.atan(tangent))
    for azimuths in ([0], [90], [180], [0, 180], [160, 200], [10, -15, 5], list(range(0, 360, 45))):
        for elevation in (-60, 0, 35):
            poses = CameraRig.from_angles(azimuths, elevation, fov, distance).camera_to_world
            for right, up in ((0, 0), (0.3 * reach, 0.2 * reach), (-reach, 0), (0, math.degrees(fov) / 2)):
                loaded = read(tmp_path, turned(poses, right, up), camera_angle_x=fov)
                assert len(loaded) == len(azimuths)
    read(tmp_path, poses, ortho_scale=1 / fill)


def test_one_camera_may_stand_far_away_or_close_up(tmp_path):
    """From 40 units the sphere is a dot, from 0.6 a wall: in Python, and in a file beside a camera that sees it whole."""
    rig = CameraRig.from_angles([0, 90], 0, 0.6, [1.7, 40.0])
    assert read(tmp_path, rig.camera_to_world, camera_angle_x=0.6) == rig
    rig = CameraRig.from_angles([0, 90], 0, 0.6, [0.6, 1.7])
    assert read(tmp_path, rig.camera_to_world, camera_angle_x=0.6) == rig
    with pytest.raises(InputError, match="^mine: the object's sphere"):
        rig[0].check_frame(["mine"])


def test_wide_pictures_may_show_it_over_half_their_height(tmp_path):
    """A sphere that fills 0.6 of the height fills a third of the width of 16 by 9, no more than an object too small in a square."""
    far = CameraRig.from_angles(
        [0, 90], 0, 0.6, 0.5 / math.sin(math.atan(0.6 * 9 / 16 * math.tan(0.3)))
    ).camera_to_world
    with pytest.raises(InputError, match="cover 8.9%"):
        read(tmp_path, far, camera_angle_x=0.6)
    assert len(read(tmp_path, far, camera_angle_x=0.6, w=1600, h=900)) == 2
    for name in ("r_0.png", "r_1.JPG"):
        Image.new("RGB", (160, 90)).save(tmp_path / name)
    assert len(read(tmp_path, far, camera_angle_x=0.6)) == 2
