"""A program that `atlas` starts in a process of its own, because xatlas cannot be interrupted: arrays in, charts out.

It is run by its path, so that nothing of the package, and no torch, is imported. Standard input and output hold `.npz` files.
"""

import faulthandler
import io
import sys


def main() -> None:
    given = sys.stdin.buffer.read()
    sys.path.pop(0)  # this folder
    import numpy as np
    import xatlas

    arrays = np.load(io.BytesIO(given))
    faulthandler.dump_traceback_later(float(arrays["time_limit"]), exit=True)  # holds even if nobody waits any more
    charts, packing = xatlas.ChartOptions(), xatlas.PackOptions()
    charts.max_chart_area = float(arrays["max_chart_area"])
    packing.resolution = int(arrays["resolution"])
    packing.padding = int(arrays["padding"])
    packing.bilinear = True
    atlas = xatlas.Atlas()
    atlas.add_mesh(arrays["vertices"], arrays["faces"])
    atlas.generate(charts, packing)
    vertex_map, faces, uvs = atlas[0]
    out = io.BytesIO()
    size = np.array([atlas.width, atlas.height])
    np.savez(out, vertex_map=vertex_map, faces=faces, uvs=uvs, size=size)
    sys.stdout.buffer.write(out.getvalue())


if __name__ == "__main__":
    main()
