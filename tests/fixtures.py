"""Fixtures for every room: tiny pipelines and data, one thread, no network."""

import ipaddress
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import create_autospec

import diffusers
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from jaxtyping import install_import_hook

from tests import quick, tiny

PACKAGE = Path(__file__).parents[1] / "spin_diffusion"


def modules_with_shapes() -> list[str]:
    """The package's modules that write down the shapes of their tensors, or use another's name for one."""
    texts = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    names = [name for text in texts.values() for name in re.findall(r"^(\w+) = (?:Float|Int)\[", text, re.MULTILINE)]
    spelled = re.compile(rf"from jaxtyping import|\b({'|'.join(names)})\b")
    found = [path.relative_to(PACKAGE.parent) for path, text in texts.items() if spelled.search(text)]
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in found]


# Shapes are checked at every call. All other annotations are mypy's: to check them here too costs six seconds an import
install_import_hook(modules_with_shapes(), "beartype.beartype")
from spin_diffusion.evaluation.report import plots  # noqa: E402

torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Fail the test that connects to anything but this machine. It does not reach into subprocesses."""
    with pytest.MonkeyPatch.context() as patch:
        for method in ("connect", "connect_ex"):
            patch.setattr(socket.socket, method, _guarded(getattr(socket.socket, method)))
        yield


def _guarded(connect):
    def guarded_connect(self: socket.socket, address):
        if not _is_local(self.family, address):
            # pytest's failure is no Exception, so a library that swallows connection errors cannot hide it.
            pytest.fail(f"a test tried to reach the network: {address!r}")
        return connect(self, address)

    return guarded_connect


def _is_local(family: socket.AddressFamily, address) -> bool:
    if family not in (socket.AF_INET, socket.AF_INET6):
        return family == socket.AF_UNIX
    host = address[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(scope="session", autouse=True)
def modules_are_no_garbage() -> None:
    quick.settle_memory()


@pytest.fixture(scope="session", autouse=True)
def no_power_cuts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", quick.no_fsync)
        yield


@pytest.fixture(autouse=True)
def charts_are_sketched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the tests of the report itself, and those that ask for `whole_charts`."""
    if "report" not in request.path.parts and "whole_charts" not in request.fixturenames:
        monkeypatch.setattr(plots, "_svg", quick.sketch)


@pytest.fixture
def whole_charts() -> None:
    """Have the charts of pages written as users see them."""


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """Let each test ask for its own precision: accelerate keeps its state for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def sd1_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny pipeline like SD 1.5; shared by the session, do not write into it."""
    return tiny.build_sd1(tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="session")
def sd2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny pipeline like SD 2.1 (v prediction, zero terminal SNR); shared by the session, do not write into it."""
    return tiny.build_sd2(tmp_path_factory.mktemp("sd2"))


@pytest.fixture(scope="session")
def sdxl_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny SDXL pipeline; shared by the session, do not write into it."""
    return tiny.build_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def tiny_parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet file with Pick-a-Pic's columns, 24 rows; the winner is coloured, the loser grey."""
    return tiny.write_parquet(tmp_path_factory.mktemp("data") / "train.parquet")


@pytest.fixture(scope="session")
def tiny_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """jsonl file of four prompts."""
    return tiny.write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Where a stand-in with the real client's signatures puts what is uploaded."""
    from spin_diffusion.runs import publish

    api, repository = create_autospec(HfApi, instance=True), tmp_path / "hub"

    def upload_folder(*, repo_id, folder_path, allow_patterns=None, commit_message) -> None:
        assert repo_id == "someone/some-model" and commit_message in ("space, 1 rounds", "spin, 1 rounds")
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, repository / name)

    api.create_repo.side_effect = lambda name, *, exist_ok: type("Address", (), {"repo_id": name})
    api.upload_folder.side_effect = upload_folder
    monkeypatch.setattr(publish, "HfApi", lambda: api)
    return repository
