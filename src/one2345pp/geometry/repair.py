"""Care of meshes: welding, degenerate faces, small holes, pinches, floaters, decimation. `extract.solidify` closes anything.

Nothing here moves a vertex but decimation, and drawing pinches apart. What loses more than 1% of the surface says so in the log.
Axes: V vertices, F faces, P points, E edges.
"""

from __future__ import annotations

import logging

import fast_simplification
import numpy as np
import trimesh
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from ..errors import InputError
from .mesh import surface_colors


logger = logging.getLogger(__name__)

LOSS = 0.01  # share of the area that may go unsaid
NO_HEIGHT = 1e-6  # a face is degenerate if its height is a smaller share of its longest edge
PINCH_GAP = 0.01  # share of the way to its neighbours by which a pinched vertex is drawn apart


def repair_mesh(mesh: trimesh.Trimesh, max_hole: float = 0.3) -> trimesh.Trimesh:
    """Weld a mesh, remove its degenerate faces and fill its small holes; one that is closed stays closed.

    Args:
        mesh: Triangles of any kind. Textures become vertex colours, because welding joins what they cut.
        max_hole: Holes whose rim is shorter than this share of the bounding box's diagonal are filled.

    Raises:
        InputError: If no face has an area.
    """
    return report_loss("repair", mesh, fill_holes(remove_degenerate(weld(mesh)), max_hole))


def is_solid(mesh: trimesh.Trimesh) -> bool:
    """Whether the mesh bounds a volume: every edge has two faces, wound alike, outwards. Cuts between charts do not count."""
    welded = mesh if mesh.is_watertight else weld(mesh)
    return bool(welded.is_watertight and welded.is_winding_consistent and welded.volume > 0)


def weld(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Vertices of one place made one, without the faces and folds (the same face twice, back to back) that vanish by it."""
    places, first, vertex = np.unique(np.asarray(mesh.vertices), axis=0, return_index=True, return_inverse=True)
    faces = vertex.reshape(-1)[mesh.faces]
    out = trimesh.Trimesh(places, faces[~_vanished(faces)], process=False)
    if len(out.faces) == 0:
        raise InputError("mesh: none of its faces has an area. Pass a mesh with a surface.")
    if mesh.visual.kind == "vertex":
        out.visual.vertex_colors = np.asarray(mesh.visual.vertex_colors)[first]
    elif mesh.visual.kind is not None:
        used, corner = np.unique(faces.ravel(), return_index=True)
        colors = np.zeros((len(places), 3))
        colors[used] = surface_colors(mesh, corner // 3, np.eye(3)[corner % 3])
        out.visual.vertex_colors = to_rgba8(colors)
    return compact(out, np.ones(len(out.faces), bool))


def remove_degenerate(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """A welded mesh without faces that have no area: each is taken out by flipping its longest edge, so no slit is left."""
    faces = np.array(mesh.faces)
    for _ in range(8):  # a flip can make another one
        thin = np.flatnonzero(_is_thin(mesh.vertices[faces]))
        if len(thin) == 0:
            break
        faces = _flipped(mesh.vertices, faces, thin)
        faces = faces[~_vanished(faces)]
    keep = ~_is_thin(mesh.vertices[faces])
    if not keep.any():
        raise InputError("mesh: none of its faces has an area. Pass a mesh with a surface.")
    return compact(_with_faces(mesh, faces), keep)


def fill_holes(mesh: trimesh.Trimesh, max_hole: float = 0.3) -> trimesh.Trimesh:
    """A welded mesh with its holes closed by a fan about the rim's middle, if the rim is short (`repair_mesh`)."""
    directed = mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    _, edge, count = np.unique(np.sort(directed, 1), axis=0, return_inverse=True, return_counts=True)
    rim = directed[count[edge.reshape(-1)] == 1][:, ::-1]  # the filling runs against the faces beside it
    if len(rim) == 0:
        return mesh
    longest = max_hole * np.linalg.norm(mesh.bounds[1] - mesh.bounds[0])
    vertices, faces, colors = list(mesh.vertices), [mesh.faces], list(mesh.visual.vertex_colors)
    for loop in _loops(rim):
        corners = mesh.vertices[loop]
        if np.linalg.norm(corners - np.roll(corners, -1, 0), axis=1).sum() > longest:
            continue
        if len(loop) == 3:
            faces.append(np.array([loop]))
            continue
        faces.append(np.stack([loop, np.roll(loop, -1), np.full(len(loop), len(vertices))], 1))
        vertices.append(corners.mean(0))
        colors.append(mesh.visual.vertex_colors[loop].mean(0).round().astype(np.uint8))
    out = trimesh.Trimesh(np.array(vertices), np.concatenate(faces), process=False)
    if mesh.visual.kind == "vertex":
        out.visual.vertex_colors = np.array(colors)
    return out


def pull_apart(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """A welded mesh whose parts touch along no edge: the two sheets of an edge with four faces get vertices of their own."""
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    directed = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)  # half edge h runs from corner h to the next of its face
    _, edge, count = np.unique(np.sort(directed, 1), axis=0, return_inverse=True, return_counts=True)
    if count.max() <= 2:
        return compact(mesh, np.ones(len(faces), bool))
    order, first = np.argsort(edge.reshape(-1), kind="stable"), np.cumsum(count) - count
    pairs = [np.stack([order[first[count == 2]], order[first[count == 2] + 1]], 1)]
    for start, size in zip(first[count > 2], count[count > 2], strict=True):
        pairs.append(_sheets(vertices, faces, directed, order[start : start + size]))
    fan = _fans(directed, np.concatenate(pairs))  # corners of one fan are one vertex
    _, corner = np.unique(fan, return_index=True)
    owner, fans = faces.ravel()[corner], fan.reshape(-1, 3)
    middle = np.zeros((len(owner), 3))
    np.add.at(middle, fans.ravel(), vertices[faces].mean(1).repeat(3, 0))
    middle /= np.bincount(fan)[:, None]
    share = np.where(_repeated(owner), PINCH_GAP, 0)[:, None]
    out = trimesh.Trimesh((1 - share) * vertices[owner] + share * middle, fans, process=False)
    if mesh.visual.kind == "vertex":
        out.visual.vertex_colors = np.asarray(mesh.visual.vertex_colors)[owner]
    return out


def keep_components(mesh: trimesh.Trimesh, min_share: float = 0.01) -> trimesh.Trimesh:
    """The mesh without floaters (area below `min_share` of the largest component's) and inside-out (inner) shells."""
    faces = mesh.faces
    edges = np.concatenate([faces[:, :2], faces[:, 1:]])
    graph = coo_matrix((np.ones(len(edges), bool), edges.T), shape=[len(mesh.vertices)] * 2)
    count, labels = connected_components(graph, directed=False)
    labels = labels[faces[:, 0]]
    area = np.bincount(labels, mesh.area_faces, minlength=count)
    triangles = mesh.triangles
    volumes = np.einsum("fi,fi->f", triangles[:, 0], np.cross(triangles[:, 1], triangles[:, 2])) / 6
    outward = np.bincount(labels, volumes, minlength=count) >= 0
    keep = (area >= min_share * area.max()) & outward
    if not keep.any():
        raise InputError("mesh: every component is inside out, so nothing would be left. Flip the faces' winding.")
    lost = area[~keep & outward].sum() / area.sum()
    if lost > LOSS:
        pieces = np.count_nonzero(~keep & outward & (area > 0))
        logger.warning("floaters: dropped %d pieces with %.1f%% of the surface.", pieces, 100 * lost)
    return compact(mesh, keep[labels])


def decimate(mesh: trimesh.Trimesh, faces: int) -> trimesh.Trimesh:
    """At most `faces` faces by quadric edge collapse, and no more than 1% (or 2) fewer if that can be; closed meshes stay closed if
    they can.

    Vertex colours are carried over from the original surface. A mesh within the budget is returned as it is.

    Raises:
        InputError: If the budget cannot be met, most often because the mesh is in too many pieces.
    """
    if faces < 4:
        raise InputError(f"faces: got {faces}, expected at least 4.")
    if len(mesh.faces) <= faces:
        return mesh
    whole = weld(mesh)  # files often split vertices
    reached, target = len(whole.faces), faces
    if reached <= faces:
        return whole
    best, fewer = None, None
    for aggressiveness in (5.0, 7.0, 7.0, 10.0, 20.0):  # gentle first
        out = _collapsed(whole, target, aggressiveness)
        reached = len(out.faces)
        target += max(faces - reached, 0)  # faces that vanished after the collapse
        if reached <= faces and (fewer is None or reached > len(fewer.faces)):
            fewer = out
        if min(0.99 * faces, faces - 2) <= reached <= faces:
            best = out if best is None or out.is_watertight else best
            if best.is_watertight or not whole.is_watertight:
                break
    if best is None and fewer is not None and len(fewer.faces) >= 4:
        best = fewer
        logger.warning("decimate: %d faces instead of %d, of the fewer that there can be.", len(best.faces), faces)
    if best is None:
        raise InputError(
            f"mesh: its {len(mesh.faces)} faces cannot be simplified to {faces}, only to {reached}: "
            "it is in too many pieces. Allow more faces, or remove small parts."
        )
    if whole.is_watertight and not best.is_watertight:
        logger.warning("decimate: the mesh was closed and has holes at %d faces.", len(best.faces))
    best.visual.vertex_colors = to_rgba8(_nearest_colors(mesh, best.vertices))
    return report_loss("decimate", mesh, best)


def report_loss(what: str, before: trimesh.Trimesh, after: trimesh.Trimesh) -> trimesh.Trimesh:
    """`after`, with a warning in the log if it has over 1% less surface than `before`."""
    lost = 1 - after.area / max(before.area, 1e-30)
    if lost > LOSS:
        logger.warning("%s: the mesh lost %.1f%% of its surface.", what, 100 * lost)
    return after


def compact(mesh: trimesh.Trimesh, keep: np.ndarray) -> trimesh.Trimesh:
    """The kept faces (`[F]` bool) and the vertices they use, with their colours."""
    used, faces = np.unique(mesh.faces[keep], return_inverse=True)
    out = trimesh.Trimesh(mesh.vertices[used], faces.reshape(-1, 3), process=False)
    if mesh.visual.kind == "vertex":
        out.visual.vertex_colors = np.asarray(mesh.visual.vertex_colors)[used]
    return out


def to_rgba8(colors: np.ndarray) -> np.ndarray:
    """sRGB `[P, 3]` in [0, 1] to opaque bytes `[P, 4]`."""
    rgb = np.rint(np.clip(colors, 0, 1) * 255).astype(np.uint8)
    return np.concatenate([rgb, np.full((len(rgb), 1), 255, np.uint8)], 1)


# --- faces ------------------------------------------------------------------------------------------------------


def _vanished(faces: np.ndarray) -> np.ndarray:
    """`[F]` bool: faces with a vertex twice, and both of a pair back to back, which enclose nothing; doubles after the first."""
    ordered = np.sort(faces, 1)
    gone = (ordered[:, 0] == ordered[:, 1]) | (ordered[:, 1] == ordered[:, 2])
    _, same, count = np.unique(ordered, axis=0, return_inverse=True, return_counts=True)
    same = same.reshape(-1)
    turned = faces[np.arange(len(faces)), (faces.argmin(1) + 1) % 3] != ordered[:, 1]
    doubled = np.flatnonzero((count[same] > 1) & ~gone)
    doubled = doubled[np.argsort(same[doubled], kind="stable")]
    for group in np.split(doubled, np.flatnonzero(np.diff(same[doubled])) + 1):
        front, back = group[~turned[group]], group[turned[group]]
        gone[front[int(len(front) > len(back)) :]] = True
        gone[back[int(len(back) > len(front)) :]] = True
    return gone


def _is_thin(
    triangles: np.ndarray,  # [F, 3, 3]
) -> np.ndarray:
    """`[F]` bool: faces without a height."""
    edges = np.roll(triangles, -1, 1) - triangles
    longest = (edges**2).sum(-1).max(1)
    return np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1) <= NO_HEIGHT * longest


def _flipped(vertices: np.ndarray, faces: np.ndarray, thin: np.ndarray) -> np.ndarray:
    """Faces after flipping the longest edges of `thin` ones, as far as they do not touch each other; lone ones are dropped."""
    faces = faces.copy()
    owners: dict[tuple[int, int], int] = {}
    for index, (a, b, c) in enumerate(faces.tolist()):
        owners[a, b] = owners[b, c] = owners[c, a] = index
    changed, drop = set(), []
    for index in thin.tolist():
        corners = vertices[faces[index]]
        a, b, c = np.roll(faces[index], -np.linalg.norm(np.roll(corners, -1, 0) - corners, axis=1).argmax()).tolist()
        other = owners.get((b, a))
        if index in changed or other in changed:
            continue
        if other is None:
            drop.append(index)
            continue
        d = next(v for v in faces[other].tolist() if v not in (a, b))
        faces[index], faces[other] = (a, d, c), (d, b, c)
        changed |= {index, other}
    return np.delete(faces, drop, 0)


def _collapsed(mesh: trimesh.Trimesh, target: int, aggressiveness: float) -> trimesh.Trimesh:
    """About `target` faces, without folds and pinches."""
    vertices, faces = fast_simplification.simplify(
        np.array(mesh.vertices), np.array(mesh.faces, np.int64), target_count=target, agg=aggressiveness
    )
    faces = faces[np.isfinite(vertices[faces]).all((1, 2))]
    faces = faces[~_vanished(faces)]
    return pull_apart(trimesh.Trimesh(vertices, faces, process=False)) if len(faces) else trimesh.Trimesh()


def _fans(
    directed: np.ndarray,  # [E, 2]
    pairs: np.ndarray,  # [., 2]
) -> np.ndarray:
    """The fan that each corner belongs to, `[E]`: the corners of one vertex that paired half edges join."""
    one, two = pairs.T
    after = np.arange(len(directed)).reshape(-1, 3)[:, [1, 2, 0]].ravel()
    opposite = directed[one, 0] != directed[two, 0]
    links = [
        np.stack([one, np.where(opposite, after[two], two)]),
        np.stack([after[one], np.where(opposite, two, after[two])]),
    ]
    links = np.concatenate(links, 1)
    graph = coo_matrix((np.ones(links.shape[1], bool), links), shape=[len(directed)] * 2)
    return connected_components(graph, directed=False)[1]


def _sheets(vertices: np.ndarray, faces: np.ndarray, directed: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Pairs `[., 2]` of the half edges of one edge: those with solid between them, by angle about the edge."""
    a, b = directed[group[0]]
    axis = vertices[b] - vertices[a]
    axis /= max(np.linalg.norm(axis), 1e-30)
    tips = vertices[faces[group // 3, (group % 3 + 2) % 3]] - vertices[a]
    u = np.cross(axis, np.eye(3)[np.abs(axis).argmin()])
    group = group[np.argsort(np.arctan2(tips @ np.cross(axis, u), tips @ u), kind="stable")]
    forward = directed[group, 0] == a  # these have the outside at growing angles, so solid lies before them
    pairs = [(group[i], group[i - 1]) for i in np.flatnonzero(forward) if not forward[i - 1]]
    if 2 * len(pairs) != len(group):  # not the border of a solid: any pairs do
        pairs = list(zip(group[forward], group[~forward], strict=False))
    return np.array(pairs, np.int64).reshape(-1, 2)


def _loops(edges: np.ndarray) -> list[list[int]]:
    """Closed walks along directed edges `[E, 2]`, each edge in one at most, no vertex twice in one."""
    after: dict[int, list[int]] = {}
    for a, b in edges.tolist():
        after.setdefault(a, []).append(b)
    loops = []
    for start in list(after):
        path = [start]
        while path and after.get(path[-1]):
            vertex = after[path[-1]].pop()
            if vertex in path:
                first = path.index(vertex)
                loops.append(path[first:])
                path = path[: first + 1]
            else:
                path.append(vertex)
    return [loop for loop in loops if len(loop) > 2]


# --- small ------------------------------------------------------------------------------------------------------


def _with_faces(mesh: trimesh.Trimesh, faces: np.ndarray) -> trimesh.Trimesh:
    out = trimesh.Trimesh(mesh.vertices, faces, process=False)
    if mesh.visual.kind == "vertex":
        out.visual.vertex_colors = mesh.visual.vertex_colors
    return out


def _repeated(values: np.ndarray) -> np.ndarray:
    """`[N]` bool: values that occur more than once."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    return count[inverse.reshape(-1)] > 1


def _nearest_colors(mesh: trimesh.Trimesh, points: np.ndarray, neighbors: int = 4) -> np.ndarray:
    """Colours of a mesh's surface near points, by inverse distance over its vertices and face centres; `[P, 3]`."""
    used, corner = np.unique(mesh.faces.ravel(), return_index=True)
    face_ids = np.concatenate([corner // 3, np.arange(len(mesh.faces))])
    barycentrics = np.concatenate([np.eye(3)[corner % 3], np.full((len(mesh.faces), 3), 1 / 3)])
    cloud = np.concatenate([mesh.vertices[used], mesh.triangles_center])
    distance, index = cKDTree(cloud).query(points, k=neighbors)
    weight = 1 / np.maximum(distance, 1e-9)
    colors = surface_colors(mesh, face_ids, barycentrics)[index]
    return np.einsum("pk,pki->pi", weight / weight.sum(1, keepdims=True), colors)
