"""Posters of the procedural world: regions bounded by curves, circles, polygons and cells, painted in order.

Coordinates are in [-1, 1], x to the right, y down. Independent of any camera.
"""

from __future__ import annotations

import numpy as np
import torch
from controlnet.model.tiny.world.scenes import Layer, Surface
from torch import Tensor


def grid(n: int, device) -> tuple[Tensor, Tensor]:
    """Pixel centres in [-1, 1]: x to the right, y down."""
    at = (torch.arange(n, device=device) + 0.5) / n * 2 - 1
    y, x = torch.meshgrid(at, at, indexing="ij")
    return x, y


def paint(layers: tuple[Layer, ...], n: int, device) -> tuple[Tensor, Tensor]:
    """The picture (n, n, 3) in [0, 1] and its depth (n, n): 2 - height of the layer."""
    x, y = grid(n, device)
    rgb = torch.zeros(n, n, 3, device=device)
    depth = torch.zeros(n, n, device=device)
    for layer in layers:
        inside = _INSIDE[layer.boundary](x, y, layer.numbers)
        dx, dy, strength = layer.shade
        ramp = dx * x[inside] + dy * y[inside]
        rgb[inside] = _striped(layer.surface, ramp) * (1 + strength * ramp)[:, None]
        depth[inside] = 2 - layer.depth - 0.1 * strength * ramp
    return rgb, depth


def _striped(surface: Surface, along: Tensor) -> Tensor:
    rgb = torch.tensor(surface.rgb, device=along.device)
    dark = ((along / surface.period).floor() % 2 if surface.pattern == "striped" else torch.zeros_like(along))[
        ..., None
    ]
    return rgb * (1 - 0.42 * dark)


def _inside_curve(x: Tensor, y: Tensor, numbers: tuple[float, ...]) -> Tensor:
    angle, offset, band, *waves = numbers
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    line = sum(a * torch.sin(f * u + p) for a, f, p in zip(waves[::3], waves[1::3], waves[2::3], strict=True))
    across = v - offset - line
    return (across > 0) & (across < band)


def _inside_circle(x: Tensor, y: Tensor, numbers: tuple[float, ...]) -> Tensor:
    cx, cy, rx, ry, angle, hole = numbers
    u = np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)
    v = np.cos(angle) * (y - cy) - np.sin(angle) * (x - cx)
    r = (u / rx) ** 2 + (v / ry) ** 2
    return (r < 1) & (r >= hole * hole)


def _inside_polygon(x: Tensor, y: Tensor, numbers: tuple[float, ...]) -> Tensor:
    """Even-odd rule over the polygon's sides; corners are (angle, radius) about a centre."""
    cx, cy, *corners = numbers
    px = [cx + r * np.cos(a) for a, r in zip(corners[::2], corners[1::2], strict=True)]
    py = [cy + r * np.sin(a) for a, r in zip(corners[::2], corners[1::2], strict=True)]
    inside = torch.zeros_like(x, dtype=torch.bool)
    for i in range(len(px)):
        x1, y1, x2, y2 = px[i - 1], py[i - 1], px[i], py[i]
        if y1 != y2:
            inside ^= ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return inside


def _inside_cell(x: Tensor, y: Tensor, numbers: tuple[float, ...]) -> Tensor:
    mine, *points = numbers
    px, py = torch.tensor(points, device=x.device).view(-1, 2, 1, 1).unbind(1)
    squared = (x - px) ** 2 + (y - py) ** 2
    return squared[int(mine)] == squared.amin(0)


_INSIDE = {"all": lambda x, y, _: torch.ones_like(x, dtype=torch.bool), "curves": _inside_curve,
           "circles": _inside_circle, "polygons": _inside_polygon, "cells": _inside_cell}  # fmt: skip
