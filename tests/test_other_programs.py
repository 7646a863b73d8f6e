"""What other programs say of our files: the Khronos glTF validator, and Blender's importers. Both are optional here.

The validator: `npm install gltf-validator`, and `NODE_PATH` pointing at its `node_modules`. Blender: `pip install bpy`.
"""

import importlib.util
import json
import shutil
import subprocess

import pytest
import trimesh
from test_gltf import bare, from_obj, textured, wedge

from one2345pp.geometry.export import export_mesh
from one2345pp.geometry.mesh import load_mesh


VALIDATE = """
const validator = require('gltf-validator');
validator.validateBytes(new Uint8Array(require('fs').readFileSync(process.argv[1])), {maxIssues: 0})
  .then(report => console.log(JSON.stringify({validator: report.validatorVersion, ...report.issues})));
"""
IMPORT = """
import json, sys
import bpy
import numpy as np

bpy.ops.wm.read_factory_settings(use_empty=True)
if sys.argv[1].endswith(".glb"):
    bpy.ops.import_scene.gltf(filepath=sys.argv[1])
else:
    bpy.ops.wm.obj_import(filepath=sys.argv[1])
points, images = [], []
for item in bpy.context.scene.objects:
    if item.type == "MESH":
        points += [tuple(item.matrix_world @ vertex.co) for vertex in item.data.vertices]
        images += [material.name for material in item.data.materials if any(
            node.type == "TEX_IMAGE" and node.image is not None for node in material.node_tree.nodes)]
points = np.array(points)
print("RESULT" + json.dumps({"low": points.min(0).tolist(), "high": points.max(0).tolist(), "textures": len(images)}))
"""


def has_validator() -> bool:
    node = shutil.which("node")
    return (
        node is not None
        and not subprocess.run([node, "-e", "require.resolve('gltf-validator')"], capture_output=True).returncode
    )


@pytest.mark.skipif(not has_validator(), reason="needs node, and gltf-validator in NODE_PATH")
@pytest.mark.parametrize("make", [wedge, textured, from_obj, bare], ids=lambda make: make.__name__)
@pytest.mark.parametrize("unlit", [False, True])
def test_the_khronos_validator_finds_nothing(make, unlit, tmp_path):
    """Oracle: the validator of the format's makers. Neither errors nor warnings."""
    path = tmp_path / "mesh.glb"
    export_mesh(make(), path, unlit=unlit)
    done = subprocess.run(["node", "-e", VALIDATE, str(path)], capture_output=True, text=True, check=True)
    issues = json.loads(done.stdout)
    assert (issues["numErrors"], issues["numWarnings"]) == (0, 0), issues["messages"]


@pytest.mark.skipif(importlib.util.find_spec("bpy") is None, reason="needs bpy, Blender as a module")
@pytest.mark.parametrize("suffix", [".glb", ".obj"])
def test_blender_imports_upright_with_texture(suffix, tmp_path, fresh_python):
    """Oracle: Blender's world is +Z up, so our +Y (up) is its +Z and our front, +Z, its -Y. The wedge reaches 0.45 to our +X,
    0.375 to +Y, 0.3 to +Z and 0.25 the other ways."""
    path = tmp_path / f"mesh{suffix}"
    mesh = textured()
    export_mesh(mesh, path)
    found = json.loads(fresh_python(IMPORT, path).split("RESULT")[1])
    assert found["low"] == pytest.approx([-0.25, -0.3, -0.25], abs=1e-3)
    assert found["high"] == pytest.approx([0.45, 0.25, 0.375], abs=1e-3)
    assert found["textures"] == 1
    assert isinstance(load_mesh(path), trimesh.Trimesh)
