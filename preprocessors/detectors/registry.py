"""The detectors: one row each. Nothing is imported until a detector is used.

To add one: a file here with a frozen options dataclass and a function `(image (H, W, 3) uint8 RGB, options) -> map` of
the same height and width, (H, W) or (H, W, 3) uint8; then a row below. Its flags and help follow from the dataclass. A
learned detector also has a row in weights.py, and its function gets the folder of these weights as a third argument. A
function that finds more than the map returns (map, fields for its PNG text). Another package adds its own rows
(`plugins`).
"""

from __future__ import annotations

import difflib
from functools import cache

from controlnet.preprocessors.detectors.detector import Detector, Table
from controlnet.preprocessors.errors import UsageError

_HED, _AUX = ("hed",), ".controlnet_aux"
_ONNX = ("onnxruntime", "onnx")
_DEPTH = (("depth", "Distance: near is white."), ("normal", "Which way surfaces face, from depth."))
_NETWORKS_OF_DEPTH = (
    ("tiny-depth", "tiny", " A rough guess; the others are good."),
    ("depth-anything-v2-small", "transformer", ""), ("depth-anything-v2-base", "transformer", ""),
    ("depth-anything-v2-large", "transformer", ""), ("depth-pro", "transformer", " Sharp, slow."),
    ("zoe", "transformer", ""), ("dpt-large", "transformer", ""), ("midas", "midas", ""),
)  # fmt: skip

_ROWS = (
    Detector("canny", "opencv", ".canny:canny", ".canny:CannyOptions",
             "Edges by brightness steps: thin white lines on black."),
    Detector("pose", "blazepose", ".pose:blazepose", ".pose:PoseOptions",
             "People as coloured skeletons of 18 joints, as OpenPose draws them.", ("blazepose",)),
    Detector("pose", "dwpose", ".dwpose:dwpose", ".dwpose:DWPoseOptions",
             "DWPose: bodies, --hands and --face.", ("dwpose",), needs=_ONNX),
    Detector("pose", "vitpose", ".pose:vitpose", ".pose:PoseOptions", "ViTPose.", ("vitpose", "rtdetr"), torch=True),
    Detector("pose", "openpose", f"{_AUX}:openpose", f"{_AUX}:OpenposeOptions",
             "OpenPose's own: bodies, --hands and --face.", ("openpose",), torch=True),
    *(
        Detector(kind, name, f".depth:{function}_{kind}", f".depth:{kind.title()}Options", help_ + more, (name,), True)
        for kind, help_ in _DEPTH
        for name, function, more in _NETWORKS_OF_DEPTH
    ),
    Detector("normal", "normalbae", f"{_AUX}:normalbae", f"{_AUX}:PlainOptions",
             "Which way surfaces face, as ControlNet 1.1 was trained on.", ("normalbae",),
             torch=True),
    Detector("normal", "moge-2", ".moge:normal", ".moge:MogeOptions", "MoGe-2: fine and true to scale.", ("moge-2",),
             needs=_ONNX),
    Detector("softedge", "hed", ".hed:softedge", ".hed:SoftEdgeOptions",
             "Edges of things as soft white lines on black.", _HED, torch=True),
    Detector("softedge", "pidinet", f"{_AUX}:pidinet", ".hed:SoftEdgeOptions", "PiDiNet: thinner edges.", ("pidinet",),
             torch=True),
    Detector("scribble", "hed", ".hed:scribble", ".hed:ScribbleOptions",
             "The main edges as thick strokes, as if drawn by hand.", _HED, torch=True),
    Detector("scribble", "xdog", ".drawing:scribble", ".drawing:ScribbleOptions",
             "Strokes where brightness changes; no network."),
    Detector("lineart", "standard", ".lineart:lineart", ".lineart:LineArtOptions",
             "What is darker than its surroundings, as lines."),
    Detector("lineart", "informative", f"{_AUX}:lineart", f"{_AUX}:LineArtOptions",
             "Lines as an artist draws them; --coarse for few.", ("lineart",), torch=True),
    Detector("lineart", "drawing", ".drawing:invert", ".drawing:InvertOptions",
             "A drawing, dark on light, turned round."),
    Detector("lineart_anime", "anime", f"{_AUX}:lineart_anime", f"{_AUX}:PlainOptions", "Lines of drawn pictures.",
             ("lineart-anime",), torch=True),
    Detector("lineart_anime", "standard", ".lineart:lineart", ".lineart:LineArtOptions",
             "What is darker than its surroundings; no network."),
    Detector("mlsd", "mlsd", ".mlsd:mlsd", ".mlsd:MlsdOptions", "Straight lines of buildings and rooms.", ("mlsd",)),
    Detector("seg", "upernet", ".seg:upernet", ".seg:SegOptions",
             "What is where, in the 150 colours of ADE20K.", ("upernet",), torch=True),
    Detector("seg", "mask2former", ".seg:mask2former", ".seg:SegOptions", "Mask2Former.", ("mask2former",), torch=True),
    Detector("region", "sam2", ".region:sam2", ".region:RegionOptions",
             "The thing at a point, white, for --mask and region=.", ("sam2",), torch=True),
    Detector("tile", "opencv", ".pictures:tile", ".pictures:TileOptions",
             "The photo itself, or with fewer details, to be filled in."),
    Detector("shuffle", "opencv", ".pictures:shuffle", ".pictures:ShuffleOptions",
             "The photo's colours and texture, flowed into one another."),
    Detector("inpaint", "opencv", ".pictures:inpaint", ".pictures:InpaintOptions",
             "The photo with a part hidden, to be made anew.", beside="mask"),
    Detector("recolor", "luminance", ".pictures:luminance", ".pictures:RecolorOptions",
             "The photo in grey, to be coloured; by lightness."),
    Detector("recolor", "intensity", ".pictures:intensity", ".pictures:RecolorOptions",
             "The photo in grey, to be coloured; by its strongest channel."),
    Detector("blur", "opencv", ".pictures:blur", ".pictures:BlurOptions", "The photo blurred, to be made sharp."),
    Detector("ip2p", "opencv", ".pictures:itself", ".pictures:PictureOptions",
             "The photo itself, to be edited by words."),
    Detector("invert", "opencv", ".drawing:invert", ".drawing:InvertOptions",
             "A drawing, dark on light, as light lines on black."),
)  # fmt: skip


def _table(rows: tuple[Detector, ...]) -> Table:
    table: Table = {}
    for row in rows:
        if row.name in table.setdefault(row.kind, {}):
            raise ValueError(f"two detectors {row.title}")
        table[row.kind][row.name] = row
    return table


DETECTORS = _table(_ROWS)


@cache
def add_plugins() -> tuple[str, ...]:
    """Add the detectors of other packages to the table, once. Returns what is wrong with those that cannot be added."""
    from controlnet.preprocessors.detectors import plugins  # here: it looks through all installed packages

    return tuple(plugins.add_all(DETECTORS))


def find_detector(kind: str, name: str | None = None) -> Detector:
    """The detector of a kind with this name, by default the kind's first. Raises UsageError for a kind or name that is
    not in the table."""
    missing = kind not in DETECTORS or name not in (None, *DETECTORS[kind])
    wrong = "".join(f"; {line}" for line in add_plugins()) if missing else ""
    if kind not in DETECTORS:
        near = difflib.get_close_matches(kind, DETECTORS, 1) or list(DETECTORS)
        raise UsageError(
            f"unknown kind {kind!r}: expected one of {', '.join(DETECTORS)}{wrong}",
            f"controlnet detect {near[0]} PHOTO",
        )
    choices = DETECTORS[kind]
    if name is None:
        return next(iter(choices.values()))
    if name not in choices:
        raise UsageError(
            f"unknown detector {name!r} for {kind}: expected one of {', '.join(choices)}{wrong}",
            f"controlnet detect {kind} PHOTO --detector {next(iter(choices))}",
        )
    return choices[name]
