"""Uploads: checked first, with the model card, and refused in one line. The hub is a stand-in for its client."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

import llmquant
from llmquant import cli
from llmquant.errors import OutputError, VerificationError


class Hub:
    """What huggingface_hub.HfApi does of which `push` makes use; calls are noted."""

    endpoint = "https://hub.example"
    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, **kwargs: Any) -> None:
        self.calls.clear()

    def create_repo(self, repo: str, **kwargs: Any) -> Any:
        if repo == "nobody/model":
            raise ConnectionError("401: who are you?\nand more")
        self.calls.append(("create_repo", kwargs))
        return SimpleNamespace(repo_id=repo if "/" in repo else f"me/{repo}")

    def upload_folder(self, **kwargs: Any) -> None:
        files = sorted(path.name for path in Path(kwargs["folder_path"]).iterdir())
        self.calls.append(("upload_folder", {**kwargs, "files": files}))


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


@pytest.fixture(scope="module")
def folder(pycode: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("push") / "out"
    llmquant.quantize(pycode, made, format="int4:g64", quality="fast")
    return made


def test_all_of_a_folder_is_sent(folder: Path, hub: type[Hub]) -> None:
    assert llmquant.push(folder, "model", private=True, revision="int4") == "https://hub.example/me/model"
    (created, made), (uploaded, sent) = hub.calls
    assert (created, made) == ("create_repo", {"private": True, "exist_ok": True})
    assert (uploaded, sent["repo_id"], sent["revision"]) == ("upload_folder", "me/model", "int4")
    assert {"README.md", "config.json", "llmquant.json", "tokenizer.json"} <= set(sent["files"])


def test_a_damaged_folder_is_not_sent(folder: Path, tmp_path: Path, hub: type[Hub]) -> None:
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    shard = sorted(damaged.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(VerificationError, match="SHA-256 differs"):
        llmquant.push(damaged, "me/model")
    assert hub.calls == []


def test_a_refusal_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(OutputError, match=r"nobody/model: the hub took no upload: 401: who are you\?: a token"):
        llmquant.push(folder, "nobody/model")
    monkeypatch.setattr(sys, "argv", ["llmquant", "push", str(folder), "me/model", "--private"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == "https://hub.example/me/model\n"
