"""The hint encoder E: a condition (B, 3, H, W) in [0, 1] becomes a feature c_f (B, C, h, w) with h = H/8 (paper Eq. 4).

Two forms. `released` is what the public checkpoints use (github.com/lllyasviel/ControlNet, cldm/cldm.py); `paper` is
what section 3.2 describes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from controlnet.model.control.zero import zero_, zero_conv
from torch import Tensor, nn

SD_WIDTHS = (16, 32, 96, 256)


class ReleasedHintEncoder(nn.Module):
    """3x3 convolutions with SiLU; between two widths a step of stride 2; the last convolution is zero.

    For Stable Diffusion 16-16-32(s2)-32-96(s2)-96-256(s2)-C. Names of parameters as in diffusers.
    """

    def __init__(self, channels_out: int, widths: Sequence[int] = SD_WIDTHS, channels_in: int = 3):
        super().__init__()
        self.conv_in = nn.Conv2d(channels_in, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in zip(widths, widths[1:], strict=False):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        gaussian_(self)
        self.conv_out = zero_(nn.Conv2d(widths[-1], channels_out, 3, padding=1))

    def forward(self, c: Tensor) -> Tensor:
        x = F.silu(self.conv_in(c))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class PaperHintEncoder(nn.Module):
    """Four 4x4 convolutions, ReLU, 16-32-64-128, Gaussian weights, then a zero 1x1 convolution to C.

    The paper's text has four strides of 2, which gives H/16, but the latent is H/8. Here the strides are 2, 2, 2, 1;
    the last one pads by (1, 2, 1, 2) to keep the size.
    """

    def __init__(self, channels_out: int, widths: Sequence[int] = (16, 32, 64, 128), channels_in: int = 3):
        super().__init__()
        ins = (channels_in, *widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 4, stride=1 if last else 2, padding=0 if last else 1)
            for i, o, last in zip(ins, widths, (False, False, False, True), strict=True)
        )
        gaussian_(self)
        self.conv_out = zero_conv(widths[-1], channels_out)

    def forward(self, c: Tensor) -> Tensor:
        x = c
        for conv in self.convs[:-1]:
            x = F.relu(conv(x))
        x = F.relu(self.convs[-1](F.pad(x, (1, 2, 1, 2))))
        return self.conv_out(x)


def gaussian_(module: nn.Module) -> None:
    """The paper's Gaussian initialisation, in the variance-keeping form (kaiming normal), biases zero.

    torch's default would shrink a line map's contrast to a hundredth on its way through the released encoder's seven
    convolutions, and the last, zero one would have next to nothing to learn from.
    """
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")


HINT_ENCODERS = {"released": ReleasedHintEncoder, "paper": PaperHintEncoder}
