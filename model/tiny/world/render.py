"""An analytic ray caster for the scenes of the procedural world: one batched tensor program, CPU or CUDA.

Gives the picture, the depth, the 18 joints in pixels and a map of what is seen where, all exact. Letters: B scenes,
H W pixels, K rays. Shading is Lambert's with one hard-shadow light.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from controlnet.model.tiny.world.posters import grid, paint
from controlnet.model.tiny.world.scenes import Body, Scene
from torch import Tensor

FLOOR, WALL, MAIN, OTHER, POSTER = 0, 1, 2, 3, 4
"""Values of `Rendering.parts`."""

_FAR = 1e6
_SAMPLES = 2  # samples per pixel and axis, averaged


@dataclass
class Rendering:
    """What a camera sees.

    images: (B, H, W, 3) uint8. depth: (B, H, W) float, metres along the view axis (posters: 2 - height of the layer).
    parts: (B, H, W) uint8, one of FLOOR, WALL, MAIN, OTHER, POSTER. joints: (B, 18, 3) x, y in pixels and visibility
    (1 seen or hidden by the person's own body, 0 outside the picture or no person).
    """

    images: Tensor
    depth: Tensor
    parts: Tensor
    joints: Tensor


@torch.no_grad()
def render(scenes: list[Scene], size: int, device: str | torch.device = "cpu") -> Rendering:
    """Draw scenes at `size` x `size` pixels, 2 x 2 samples per pixel."""
    n = size * _SAMPLES
    rgb = torch.zeros(len(scenes), n, n, 3, device=device)
    depth = torch.full((len(scenes), n, n), _FAR, device=device)
    parts = torch.full((len(scenes), n, n), POSTER, dtype=torch.uint8, device=device)
    joints = torch.zeros(len(scenes), 18, 3)
    solid = [i for i, s in enumerate(scenes) if s.sort != "poster"]
    if solid:
        rgb[solid], depth[solid], parts[solid] = _cast([scenes[i] for i in solid], n, device)
    for i, scene in enumerate(scenes):
        if scene.sort == "poster":
            rgb[i], depth[i] = paint(scene.layers, n, device)
        if scene.joints:
            joints[i] = torch.from_numpy(project_joints(scene, size))
    pooled = F.avg_pool2d(rgb.permute(0, 3, 1, 2), _SAMPLES).permute(0, 2, 3, 1)
    images = (pooled.clamp(0, 1) * 255).round().to(torch.uint8)
    return Rendering(images, depth[:, ::_SAMPLES, ::_SAMPLES], parts[:, ::_SAMPLES, ::_SAMPLES], joints)


def _axes(scene: Scene) -> np.ndarray:
    """Rows right, up, forward of the camera."""
    camera = scene.camera
    forward = np.subtract(camera.target, camera.eye)
    forward /= np.linalg.norm(forward)
    right = np.cross((0, 1, 0), forward)
    right /= np.linalg.norm(right)
    up = np.cross(forward, right)
    c, s = np.cos(camera.roll), np.sin(camera.roll)
    return np.stack([c * right + s * up, c * up - s * right, forward])


def project_joints(scene: Scene, size: int) -> np.ndarray:
    """The person's joints in pixels, `(18, 3)`: x, y, visibility (0 outside the picture)."""
    local = (np.asarray(scene.joints) - scene.camera.eye) @ _axes(scene).T
    xy = local[:, :2] / local[:, 2:] / np.tan(scene.camera.fov / 2) * [1, -1]
    pixels = (xy + 1) / 2 * size
    inside = ((pixels >= 0) & (pixels < size)).all(1, keepdims=True)
    return np.concatenate([pixels, inside], 1).astype(np.float32)


class _Bodies:
    """The primitives of B scenes as tables: one row per (scene, primitive)."""

    def __init__(self, scenes: list[Scene], device):
        rows = [(i, body) for i, scene in enumerate(scenes) for body in scene.bodies]
        self.bodies = [body for _, body in rows]
        self.rows = [[row for row, (scene, _) in enumerate(rows) if scene == i] for i in range(len(scenes))]

        def table(get) -> Tensor:
            return torch.tensor([get(body) for body in self.bodies], dtype=torch.float32, device=device)

        self.a, self.b, self.radius = table(lambda o: o.a), table(lambda o: o.b), table(lambda o: o.radius)
        yaw = table(lambda o: o.yaw)
        self.cos, self.sin = yaw.cos(), yaw.sin()
        self.shape = table(lambda o: list(_INTERSECT).index(o.shape)).long()
        self.rgb = table(lambda o: o.surface.rgb)
        self.part = table(lambda o: MAIN if o.part == 0 else OTHER).to(torch.uint8)
        spheres = [_bounding_sphere(body) for body in self.bodies]
        self.centre = torch.tensor([c for c, _ in spheres], dtype=torch.float32, device=device)
        self.reach = torch.tensor([r for _, r in spheres], dtype=torch.float32, device=device)


def _bounding_sphere(body: Body) -> tuple[tuple[float, float, float], float]:
    (ax, ay, az), (bx, by, bz) = body.a, body.b
    if body.shape == "capsule":
        return ((ax + bx) / 2, (ay + by) / 2, (az + bz) / 2), float(
            np.linalg.norm(np.subtract(body.a, body.b))
        ) / 2 + body.radius
    if body.shape == "sphere":
        return body.a, body.radius
    if body.shape == "cube":
        return body.a, float(np.linalg.norm(body.b))
    return (ax, ay + by / 2, az), float(np.hypot(bx, by / 2))


@dataclass
class Hits:
    """What each of the K rays of a scene meets first. Letters as above; lengths in metres.

    points, normals: (B, K, 3). distance: (B, K) along the ray. depth: (B, K) along the view axis. row: (B, K) the
    primitive's row in `bodies`, ON_FLOOR or ON_WALL. light: (B, K) in [0, 1], Lambert's cosine, 0 in a shadow.
    """

    points: Tensor
    normals: Tensor
    distance: Tensor
    depth: Tensor
    row: Tensor
    light: Tensor
    bodies: _Bodies


ON_FLOOR, ON_WALL = -1, -2


@torch.no_grad()
def trace(scenes: list[Scene], n: int, device: str | torch.device = "cpu") -> Hits:
    """The first hit of n x n rays, row by row from the upper left, of scenes with a floor and a wall."""
    b = len(scenes)
    x, y = grid(n, device)
    axes = torch.tensor(np.stack([_axes(s) for s in scenes]), dtype=torch.float32, device=device)
    half = torch.tensor([np.tan(s.camera.fov / 2) for s in scenes], dtype=torch.float32, device=device)
    plane = torch.stack([x, -y, torch.ones_like(x)], -1).reshape(1, -1, 3).repeat(b, 1, 1)
    plane[..., :2] *= half[:, None, None]
    rays = F.normalize(plane @ axes, dim=-1)  # (B, K, 3)
    eye = per_scene(scenes, lambda s: s.camera.eye, device)
    origins = eye.expand_as(rays)

    bodies = _Bodies(scenes, device)
    t, which = _nearest(bodies, origins, rays)
    floor_t = -origins[..., 1] / rays[..., 1].clamp(max=-1e-6)
    floor_t[rays[..., 1] > -1e-6] = _FAR
    wall_n = per_scene(scenes, lambda s: (np.sin(s.wall_turn), 0.0, -np.cos(s.wall_turn)), device)
    wall_p = per_scene(scenes, lambda s: (0.0, 0.0, s.wall_at), device)
    towards = (rays * wall_n).sum(-1)
    wall_t = ((wall_p - origins) * wall_n).sum(-1) / towards.clamp(max=-1e-6)
    wall_t[towards > -1e-6] = _FAR

    ground = torch.minimum(floor_t, wall_t)
    on_floor, on_body = floor_t <= wall_t, t < ground
    t = torch.minimum(t, ground)
    points = origins + t[..., None] * rays
    up = torch.tensor([0.0, 1.0, 0.0], device=device)
    normals = torch.where(on_floor[..., None], up, wall_n)
    row = torch.where(on_body, which, torch.where(on_floor, ON_FLOOR, ON_WALL))
    at = on_body.nonzero(as_tuple=True)
    if len(at[0]):
        normals[at] = _normals(bodies, row[at], points[at])
    light = per_scene(scenes, lambda s: s.light, device)
    lambert = (normals * light).sum(-1).clamp(min=0)
    shadow_t, _ = _nearest(bodies, points + normals * 2e-3, light.expand_as(points))
    lambert = torch.where(shadow_t < _FAR, 0.0, lambert)
    return Hits(points, normals, t, t * (rays * axes[:, None, 2]).sum(-1), row, lambert, bodies)


def _cast(scenes: list[Scene], n: int, device) -> tuple[Tensor, Tensor, Tensor]:
    hits = trace(scenes, n, device)
    on_floor, at = hits.row == ON_FLOOR, (hits.row >= 0).nonzero(as_tuple=True)
    colours = torch.where(
        on_floor[..., None], _floor_colour(scenes, hits.points, device), per_scene(scenes, lambda s: s.wall.rgb, device)
    )
    parts = torch.where(on_floor, FLOOR, WALL).to(torch.uint8)
    if len(at[0]):
        colours[at], parts[at] = hits.bodies.rgb[hits.row[at]], hits.bodies.part[hits.row[at]]
    ambient = per_scene(scenes, lambda s: (s.ambient,), device)
    shade = ambient + (1 - ambient) * hits.light[..., None]
    shape = (len(scenes), n, n)
    return (colours * shade).reshape(*shape, 3), hits.depth.reshape(shape), parts.reshape(shape)


def per_scene(scenes: list[Scene], get, device) -> Tensor:
    """(B, 1, C) from a property of each scene."""
    return torch.tensor(np.array([get(s) for s in scenes]), dtype=torch.float32, device=device)[:, None]


def _nearest(bodies: _Bodies, origins: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (B, K) to the first primitive hit (_FAR for none) and its row in the table."""
    # Scene by scene the rays stay in a CPU's cache; a GPU would wait for so many small operations.
    together = 1 if rays.device.type == "cpu" else len(rays)
    parts = [
        _first_of(bodies, at, origins[at : at + together], rays[at : at + together])
        for at in range(0, len(rays), together)
    ]
    best, which = (torch.cat(part) for part in zip(*parts, strict=True))
    return best, which


def _first_of(bodies: _Bodies, at: int, origins: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """`_nearest` of some scenes, from scene `at` on."""
    count, k, device = *rays.shape[:2], rays.device
    best, which = (
        torch.full((count * k,), _FAR, device=device),
        torch.full((count * k,), len(bodies.bodies), device=device),
    )
    rows = bodies.rows[at : at + count]
    most = max(map(len, rows))
    if not most:
        return best.view(count, k), torch.zeros_like(which).view(count, k)
    table = torch.tensor([own + [0] * (most - len(own)) for own in rows], device=device)  # (B, bodies)
    there = torch.tensor([[True] * len(own) + [False] * (most - len(own)) for own in rows], device=device)

    # Only the rays that meet a body's bounding sphere are worth the exact test: |near|^2 - (near . d)^2 <= reach^2
    # with near = centre - o, written as matrix products.
    centre, reach = bodies.centre[table], bodies.reach[table][:, None] + 5e-3
    along = rays @ centre.mT - (origins * rays).sum(-1, keepdim=True)
    squared = (centre * centre).sum(-1)[:, None] - 2 * (origins @ centre.mT) + (origins * origins).sum(-1, keepdim=True)
    meets = (squared - along * along <= reach**2) & (along > -reach) & there[:, None]

    scene, ray, column = meets.nonzero(as_tuple=True)  # pairs of a ray and a body
    row, ray = table[scene, column], scene * k + ray
    o, d = origins.reshape(-1, 3), rays.reshape(-1, 3)
    t = torch.full(ray.shape, torch.nan, device=device)
    for shape in {bodies.bodies[i].shape for own in rows for i in own}:
        pair = (bodies.shape[row] == list(_INTERSECT).index(shape)).nonzero()[:, 0]
        t[pair] = _INTERSECT[shape](bodies, row[pair], o[ray[pair]], d[ray[pair]])
    t = torch.where(torch.isfinite(t) & (t > 1e-4), t, _FAR)
    best.scatter_reduce_(0, ray, t, "amin")
    first = t == best[ray]  # where bodies meet, the first one in the table
    which.scatter_reduce_(0, ray[first], row[first], "amin")
    return best.view(count, k), torch.where(best < _FAR, which, 0).view(count, k)


# How far along rays (o, d) (P, 3) the bodies `i` (P,) of a table are met: (P,), nan or _FAR where they are not.


def _quadratic(a: Tensor, half_b: Tensor, c: Tensor) -> Tensor:
    """The nearer root of a t^2 + 2 half_b t + c; nan where there is none."""
    return (-half_b - (half_b * half_b - a * c).sqrt()) / a


def _hit_sphere(s: _Bodies, i: Tensor, o: Tensor, d: Tensor) -> Tensor:
    oc = o - s.a[i]
    return _quadratic(torch.ones_like(oc[:, 0]), (oc * d).sum(-1), (oc * oc).sum(-1) - s.radius[i] ** 2)


def _hit_cube(s: _Bodies, i: Tensor, o: Tensor, d: Tensor) -> Tensor:
    o, d = _to_local(s, i, o - s.a[i]), _to_local(s, i, d)
    one, two = (-s.b[i] - o) / d, (s.b[i] - o) / d
    enter, leave = torch.minimum(one, two).amax(-1), torch.maximum(one, two).amin(-1)
    return torch.where(enter < leave, enter, torch.nan)


def _to_local(s: _Bodies, i: Tensor, v: Tensor) -> Tensor:
    c, n = s.cos[i], s.sin[i]
    return torch.stack([c * v[:, 0] - n * v[:, 2], v[:, 1], n * v[:, 0] + c * v[:, 2]], -1)


def _hit_cylinder(s: _Bodies, i: Tensor, o: Tensor, d: Tensor) -> Tensor:
    oc = o - s.a[i]
    r, h = s.b[i, 0], s.b[i, 1]
    side = _quadratic(
        d[:, 0] ** 2 + d[:, 2] ** 2, oc[:, 0] * d[:, 0] + oc[:, 2] * d[:, 2], oc[:, 0] ** 2 + oc[:, 2] ** 2 - r * r
    )
    y = oc[:, 1] + side * d[:, 1]
    side = torch.where((y >= 0) & (y <= h) & (side > 0), side, _FAR)
    top = (h - oc[:, 1]) / d[:, 1]
    p = oc + top[:, None] * d
    top = torch.where((p[:, 0] ** 2 + p[:, 2] ** 2 <= r * r) & (top > 0), top, _FAR)
    return torch.minimum(side.nan_to_num(_FAR), top.nan_to_num(_FAR))


def _hit_cone(s: _Bodies, i: Tensor, o: Tensor, d: Tensor) -> Tensor:
    r, h = s.b[i, 0], s.b[i, 1]
    oc = o - s.a[i] - torch.stack([0 * h, h, 0 * h], -1)  # from the apex; the cone lies below it
    k = (r / h) ** 2
    a = d[:, 0] ** 2 + d[:, 2] ** 2 - k * d[:, 1] ** 2
    half_b = oc[:, 0] * d[:, 0] + oc[:, 2] * d[:, 2] - k * oc[:, 1] * d[:, 1]
    c = oc[:, 0] ** 2 + oc[:, 2] ** 2 - k * oc[:, 1] ** 2
    root = (half_b * half_b - a * c).sqrt()
    best = torch.full_like(a, _FAR)
    for t in ((-half_b - root) / a, (-half_b + root) / a):
        y = oc[:, 1] + t * d[:, 1]
        best = torch.where((y <= 0) & (y >= -h) & (t > 0) & (t < best), t, best)
    return best


def _hit_capsule(s: _Bodies, i: Tensor, o: Tensor, d: Tensor) -> Tensor:
    ba, oa, r = s.b[i] - s.a[i], o - s.a[i], s.radius[i]
    baba, bard, baoa = (ba * ba).sum(-1) + 1e-9, (d * ba).sum(-1), (oa * ba).sum(-1)
    rdoa, oaoa = (d * oa).sum(-1), (oa * oa).sum(-1)
    t = _quadratic(baba - bard * bard, baba * rdoa - baoa * bard, baba * oaoa - baoa * baoa - r * r * baba)
    y = baoa + t * bard
    tube = torch.where((y > 0) & (y < baba), t, _FAR).nan_to_num(_FAR)
    ends = []
    for end in (s.a[i], s.b[i]):
        oc = o - end
        ends.append(_quadratic(torch.ones_like(rdoa), (oc * d).sum(-1), (oc * oc).sum(-1) - r * r).nan_to_num(_FAR))
    return torch.minimum(tube, torch.minimum(*ends))


_INTERSECT = {"sphere": _hit_sphere, "cube": _hit_cube, "cylinder": _hit_cylinder, "cone": _hit_cone,
              "capsule": _hit_capsule}  # fmt: skip


def _normals(s: _Bodies, row: Tensor, p: Tensor) -> Tensor:
    """Outward unit normals (K, 3) at points on the primitives `row`, computed by all formulas at once, then
    selected."""
    a, b = s.a[row], s.b[row]
    v = p - a
    flat = v * torch.tensor([1.0, 0.0, 1.0], device=p.device)
    up = torch.tensor([0.0, 1.0, 0.0], device=p.device).expand_as(v)
    ba = b - a
    tube = v - ((v * ba).sum(-1, keepdim=True) / ((ba * ba).sum(-1, keepdim=True) + 1e-9)).clamp(0, 1) * ba
    c, n = s.cos[row], s.sin[row]
    local = torch.stack([c * v[:, 0] - n * v[:, 2], v[:, 1], n * v[:, 0] + c * v[:, 2]], -1) / b
    face = F.one_hot(local.abs().argmax(-1), 3) * local.sign()
    cube = torch.stack([c * face[:, 0] + n * face[:, 2], face[:, 1], c * face[:, 2] - n * face[:, 0]], -1)
    cylinder = torch.where((v[:, 1:2] > b[:, 1:2] - 1e-3), up, flat)
    cone = F.normalize(flat, dim=-1) * b[:, 1:2] + up * b[:, :1]
    shape = s.shape[row][:, None]
    out = torch.where(
        shape == 0,
        v,
        torch.where(shape == 1, cube, torch.where(shape == 2, cylinder, torch.where(shape == 3, cone, tube))),
    )
    return F.normalize(out, dim=-1)


def _floor_colour(scenes: list[Scene], hits: Tensor, device) -> Tensor:
    rgb = per_scene(scenes, lambda s: s.floor.rgb, device)
    period = per_scene(scenes, lambda s: (s.floor.period,), device)
    cells = (hits[..., ::2] / period).floor()
    checkered = per_scene(scenes, lambda s: (s.floor.pattern == "checkered",), device)
    striped = per_scene(scenes, lambda s: (s.floor.pattern == "striped",), device)
    dark = checkered[..., 0] * ((cells[..., 0] + cells[..., 1]) % 2) + striped[..., 0] * (cells[..., 0] % 2)
    return rgb * (1 - 0.42 * dark[..., None])
