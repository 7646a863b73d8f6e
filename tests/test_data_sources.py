"""What a data set is made of: names of objects, tables, and folders that are prepared once more."""

import json
from pathlib import Path

import pytest
import trimesh

from one2345pp.cli import main
from one2345pp.data import sources
from one2345pp.data.dataset import PreparedDataset
from one2345pp.data.prepare import prepare
from one2345pp.errors import InputError
from one2345pp.files import read_table
from one2345pp.geometry.export import export_mesh
from one2345pp.geometry.mesh import load_mesh


TINY = {"frames": 1, "view_size": 16, "resolution": 16, "workers": 1}


@pytest.fixture
def scanned(tmp_path) -> Path:
    """Meshes as Google Scanned Objects has them, a cube and a ball, and a cone of a name of its own."""
    solids = {"shoe/meshes/model": trimesh.creation.box(), "pot/meshes/model": trimesh.creation.icosphere(1)}
    for name, mesh in (solids | {"cone": trimesh.creation.cone(1, 1)}).items():
        file = tmp_path / "scanned" / f"{name}.ply"
        file.parent.mkdir(parents=True, exist_ok=True)
        mesh.export(file)
    return tmp_path / "scanned"


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.zip"))


def test_files_of_one_stem_are_different_objects(scanned, tmp_path):
    """Oracle: the command on the layout of Google Scanned Objects: a sample an object, the table's tiers by their names, and of a
    split only those that the table says."""
    table = tmp_path / "table.csv"
    table.write_text(
        "name,tier,split\nshoe__meshes__model,scan,train\npot__meshes__model,textured,val\ncone,scan,val\n"
    )
    options = "--frames 1 --view-size 16 --resolution 16 --workers 1".split()
    assert main(["prepare", str(scanned), "-o", str(tmp_path / "all"), "--table", str(table), *options]) == 0
    data = PreparedDataset(tmp_path / "all")
    assert {item["name"]: item["tier"] for item in data} == {
        "cone": "scan",
        "pot__meshes__model": "textured",
        "shoe__meshes__model": "scan",
    }
    assert (data[1]["sdf"] != data[2]["sdf"]).any()
    split = ["--table", str(table), "--split", "val"]
    assert main(["prepare", str(scanned), "-o", str(tmp_path / "val"), *split, *options]) == 0
    assert names(tmp_path / "val") == ["cone.0.zip", "pot__meshes__model.0.zip"]


def test_names_that_stay_the_same_are_refused(scanned, tmp_path):
    """Oracle: the error has both files; nothing is written. A file that is passed twice is one."""
    shoe, pot = (scanned / name / "meshes" / "model.ply" for name in ("shoe", "pot"))
    for meshes in ([shoe, pot], [scanned / "shoe", scanned / "pot"]):
        with pytest.raises(InputError, match=f"{shoe} and {pot}: .*'(meshes__)?model'.*the folder that holds both"):
            prepare(meshes, tmp_path / "data", **TINY)
    (scanned / "procedural_00000.ply").write_bytes(shoe.read_bytes())
    with pytest.raises(InputError, match="procedural_00000.ply: is called as"):
        prepare([scanned], tmp_path / "data", shapes=1, **TINY)
    assert not (tmp_path / "data").exists()
    assert sources.find_meshes([shoe, scanned / "shoe"]) == {"model": shoe}


def test_folders_give_only_what_can_be_read(scanned, tmp_path):
    """Oracle: `load_mesh` on a file of every suffix that is taken; a USDZ, which it cannot read, is left."""
    for suffix in sources.SUFFIXES:
        export_mesh(trimesh.creation.box(), tmp_path / f"box{suffix}")
        assert len(load_mesh(tmp_path / f"box{suffix}").faces) == 12
    export_mesh(trimesh.creation.box(), scanned / "box.usdz")
    assert "box" not in sources.find_meshes([scanned])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: holds no mesh files"):
        prepare([tmp_path / "empty"], tmp_path / "data", **TINY)


def test_tables_that_cannot_be_used_say_what_is_wrong(tmp_path, scanned):
    """Oracle: the words of each error; what a spreadsheet writes is read."""
    table = tmp_path / "table.csv"
    with pytest.raises(InputError, match="table.csv: no such file. Pass a CSV with the columns name, tier"):
        read_table(table, ("name", "tier"))
    for content, words in (
        (b"", "has no column name, tier"),
        (b"name,split\na,train\n", "has no column tier"),
        (b"name,tier\na,scan\nb\n", "row 2 ends before"),
        (b"\xff\xfe", "is not a CSV file"),
    ):
        table.write_bytes(content)
        with pytest.raises(InputError, match=words):
            read_table(table, ("name", "tier"))
    table.write_bytes(b"\xef\xbb\xbfname,tier,split\r\nmug,scan,train\r\n")
    assert read_table(table, ("name", "tier")) == [{"name": "mug", "tier": "scan", "split": "train"}]
    with pytest.raises(InputError, match="none of the 3 meshes in 'train'"):
        sources.find_sources([scanned], table, "train")
    with pytest.raises(InputError, match="'train' needs a table"):
        sources.find_sources([scanned], None, "train")


@pytest.fixture
def prepared(scanned, tmp_path) -> Path:
    """A data set of the cone, whose tier a table says."""
    (tmp_path / "table.csv").write_text("name,tier\ncone,scan\n")
    prepare([scanned / "cone.ply"], tmp_path / "data", table=tmp_path / "table.csv", **TINY)
    return tmp_path / "data"


def test_objects_can_be_added_to_a_folder(scanned, prepared):
    """Oracle: the tiers, as each was said first; later calls without a table take none away."""
    prepare([scanned / "cone.ply"], prepared, shapes=1, **TINY)
    prepare([scanned], prepared, **TINY)
    tiers = {item["name"]: item["tier"] for item in PreparedDataset(prepared)}
    low = dict.fromkeys(["shoe__meshes__model", "pot__meshes__model"], "lowpoly")
    assert tiers == {"cone": "scan", "procedural_00000": "procedural", **low}


def test_other_settings_are_refused_before_anything_is_written(scanned, prepared):
    """Oracle: every file of the folder as it was; the error says what differs and what to do."""
    before = {file: file.read_bytes() for file in prepared.iterdir()}
    for change, words in (
        ({"resolution": 32}, "resolution is 16, not 32; truncation is 0.2, not 0.1"),
        ({"view_size": 24}, "view_size is 16, not 24"),
        ({"maps": ["normals"]}, r"maps is \[\], not \['normals'\]"),
        ({"rings": ["zero123plus-v1.1"]}, "rigs is .* not .*; rings is False, not True"),
    ):
        with pytest.raises(InputError, match=f"other settings: {words}.* Prepare into another folder"):
            prepare([scanned], prepared, **(TINY | change))
    assert {file: file.read_bytes() for file in prepared.iterdir()} == before


@pytest.mark.parametrize("normals", [False, True])
def test_folders_from_before_maps_had_names_can_grow(scanned, tmp_path, normals):
    """Oracle: objects are added to a folder whose index says `normals`; with other maps than those it is refused."""
    names, others = (["normals"], []) if normals else ([], ["normals"])
    prepare([scanned / "cone.ply"], tmp_path / "data", maps=names, **TINY)
    index = tmp_path / "data" / "index.json"
    settings = json.loads(index.read_text())
    assert settings.pop("maps") == names
    index.write_text(json.dumps(settings | {"normals": normals}))
    assert ("normals" in PreparedDataset(tmp_path / "data")[0]) == normals
    with pytest.raises(InputError, match="other settings: maps is"):
        prepare([scanned], tmp_path / "data", maps=others, **TINY)
    prepare([scanned], tmp_path / "data", maps=names, **TINY)
    assert [("normals" in item) for item in PreparedDataset(tmp_path / "data")] == [normals] * 3


def test_maps_that_cannot_be_drawn_are_refused(scanned, tmp_path):
    for options, words in (
        ({"maps": ["depht"]}, "maps: got depht, expected some of normals"),
        ({"maps": ["normals"], "rings": ["zero123plus-v1.1"]}, "maps: rings have none"),
    ):
        with pytest.raises(InputError, match=words):
            prepare([scanned], tmp_path / "data", **TINY, **options)
    assert not (tmp_path / "data").exists()


def test_a_cut_leaves_the_index_whole(scanned, prepared, monkeypatch):
    """Oracle: the index before a writing that fails half way."""
    before, write = json.loads((prepared / "index.json").read_text()), Path.write_text

    def half(path, text, *args, **kwargs):
        write(path, text[: len(text) // 2], *args, **kwargs)
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space"):
        prepare([scanned], prepared, **TINY)
    assert json.loads((prepared / "index.json").read_text()) == before
