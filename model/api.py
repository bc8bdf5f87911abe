"""The public names, in one place. What is not listed here may change from version to version.

from controlnet.model.api import Job, Studio, stage_one
"""

from __future__ import annotations

from controlnet.model.base import Base
from controlnet.model.control.controlnet import ControlNet
from controlnet.model.control.strength import Strength
from controlnet.model.control.zero import ControlledBlock, zero_conv
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet, save_controlnet
from controlnet.model.work.jobs import Job
from controlnet.model.work.prepared import Image
from controlnet.model.work.replay import replay
from controlnet.model.work.score import Scored, Scorer, score
from controlnet.model.work.studio import Studio
from controlnet.preprocessors.condition import Condition, read_condition
from controlnet.preprocessors.errors import ControlNetError
from controlnet.preprocessors.stage_one import stage_one

__all__ = [
    "Base",
    "Condition",
    "ControlNet",
    "ControlNetError",
    "ControlledBlock",
    "Image",
    "Job",
    "Scored",
    "Scorer",
    "Strength",
    "Studio",
    "load_base",
    "load_controlnet",
    "read_condition",
    "replay",
    "save_controlnet",
    "score",
    "stage_one",
    "zero_conv",
]
