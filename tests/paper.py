"""What the tests of the paper profile share: a notebook laid out in a folder of its own with the profile's names and
other values, and text as the hub lays it out."""

import json
import shutil
from pathlib import Path

import datasets
import nbformat

from tensorlens_utils.notebooks import Series

ROOT = Path(__file__).resolve().parents[1]


def paper_series(folder, name, changed, files=()):
    """A series in the paper profile, ready to run: one notebook of the repository, in `folder`, with these of its
    parameters changed; and with further files of the repository, where it reads some."""
    for path in (f"notebooks/{name}.ipynb", "tests/nbval_sanitize.cfg", "constraints.txt", *files):
        (folder / path).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / path, folder / path)
    sizes = Series(ROOT).table[name]
    assert sizes["paper"].keys() == sizes["tiny"].keys() >= changed.keys()
    (folder / "notebooks" / "parameters.toml").write_text("\n".join(
        line for profile, values in (("tiny", sizes["tiny"]), ("paper", sizes["paper"] | changed))
        for line in (f"[{name}.{profile}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()))))
    return Series(folder, "paper")


def outputs(folder, name):
    """What the notebook left, and what it printed."""
    ran = nbformat.read(folder / "build" / "paper" / f"{name}.ipynb", 4)
    found = [output for cell in ran.cells for output in cell.get("outputs", [])]
    assert not (folder / "figures").exists()  # the repository's stay as they are
    return found, "".join(output.get("text", "") for output in found)


def lay_out_wikitext(folder, rows):
    """The layout and schema of Salesforce/wikitext: several sets under one name; rows: name -> lines."""
    configs = ""
    for name, lines in rows.items():
        (folder / name).mkdir()
        configs += f"- config_name: {name}\n  data_files:\n"
        for split in ("test", "train", "validation"):
            datasets.Dataset.from_dict({"text": lines}).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
            configs += f"  - split: {split}\n    path: {name}/{split}-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder
