"""What all tests share: the quiet, offline environment of `make`, the real data beside the project, the machine."""
import json
import os
from pathlib import Path

import pytest

from tensorlens_utils.notebooks import batch_environment

ROOT = Path(__file__).resolve().parents[1]

# nbval's kernels inherit these
os.environ.update(batch_environment(), TENSORLENS_FIGURES=str(ROOT / "build" / "test-figures"))


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data, $TENSORLENS_DATA or ../shared/data; skips, and says why, where it is absent."""
    folder = Path(os.environ.get("TENSORLENS_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "PROVENANCE.md").exists():
        pytest.skip(f"no real data in {folder}: set TENSORLENS_DATA to a folder that has it")
    return folder


@pytest.fixture
def environment():
    """Takes back what a run of notebooks changes in the environment."""
    saved = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture(scope="session", autouse=True)
def one_thread(request):
    """The tests' models are tiny, and two threads only wait for one another; benchmarks keep all cores."""
    import torch

    if not any("benchmarks" in str(item.path) for item in request.session.items):
        torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    """Committed measurements name the hardware, and not the host."""
    import torch
    machine_info.pop("node", None)
    machine_info.update(cores=os.cpu_count(), threads=torch.get_num_threads(), torch=torch.__version__,
                        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, output_json):
    """`make bench ARGS='-k relations'` renews what it measures; other rows from the same kind of machine stay.

    Each row has its own hour, so that it shows which were measured together.
    """
    for row in output_json["benchmarks"]:
        row["datetime"] = output_json["datetime"]
    path = config.option.benchmark_json
    if not (config.option.keyword and path and path.exists()):
        return
    before = json.loads(path.read_text())
    machine = [{key: run["machine_info"].get(key) for key in ("cores", "threads", "torch", "gpu")} | {
        "cpu": run["machine_info"]["cpu"].get("brand_raw")} for run in (before, output_json)]
    if machine[0] == machine[1]:
        new = {row["fullname"] for row in output_json["benchmarks"]}
        kept = [{"datetime": before["datetime"], **row} for row in before["benchmarks"] if row["fullname"] not in new]
        output_json["benchmarks"][:0] = kept
