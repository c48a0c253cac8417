"""``hf-sage push``: a finished run to a Hub, with the real client, over HTTP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Failure, Hub, Request, point_client_at, serve
from transformers import AutoModelForImageClassification, CLIPImageProcessorPil, Trainer, TrainingArguments

from hf_sage.benchmark.push import main
from hf_sage.models import tiny_clip

WORKED = Path(__file__).parent.parent / "model_cards" / "style_digits" / "run"
TOKEN = "hf_" + ("sEcReT" * 6)[:34]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as hub:
        point_client_at(hub, monkeypatch, tmp_path / "cache", token=TOKEN)
        yield hub


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with its model."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(WORKED / "result.json", folder)
    (folder / "done").touch()
    model, processor = tiny_clip([str(i) for i in range(10)])
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def commits(request: Request) -> bool:
    return "/commit/" in request.path


def test_a_pushed_run_loads_with_the_same_bits(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--repo-id", "me/digits", "--private", "--license", "mit"]) == 0
    repo = hub.repositories["me/digits"]
    assert repo.private
    assert b"# digits" in repo.files["README.md"]
    assert f"{hub.url}/me/digits/commit/" in capsys.readouterr().out
    assert not any(TOKEN.encode() in content for content in hub.uploads())
    images = torch.randn(2, 3, 16, 16)
    local = AutoModelForImageClassification.from_pretrained(run / "model")
    loaded = AutoModelForImageClassification.from_pretrained("me/digits")
    assert torch.equal(local(images).logits, loaded(images).logits)
    assert CLIPImageProcessorPil.from_pretrained("me/digits").size["height"] == 16


@pytest.mark.parametrize("lfs", [False, True])
def test_pushing_again_commits_nothing(hub: Hub, run: Path, lfs: bool) -> None:
    hub.uses_lfs = lambda path: lfs and path.endswith(".safetensors")
    for _ in range(2):
        assert main([str(run), "--repo-id", "me/digits"]) == 0
    assert hub.commits_of("me/digits") == 1
    assert len(hub.objects) == lfs


def test_a_branch_is_made(hub: Hub, run: Path) -> None:
    for _ in range(2):
        assert main([str(run), "--repo-id", "me/digits", "--revision", "seed-0"]) == 0
    branches = hub.repositories["me/digits"].branches
    assert "model.safetensors" in branches["seed-0"]
    assert branches["main"] == {}


def test_a_dry_run_sends_nothing(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--repo-id", "me/digits", "--dry-run"]) == 0
    assert hub.requests == []
    assert {"README.md", "config.json", "model.safetensors"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (Failure(401), "hf auth login"),
        (Failure(403), "write permission"),
        (Failure(404), "Check the name"),
        (Failure(413), "of this size"),
        (Failure(429), "patience"),
        (Failure(500), "Do it again later"),
        (Failure(0), "Check the network"),
    ],
)
@pytest.mark.parametrize("stage", ["create", "preupload", "commit"])
def test_a_failure_changes_nothing_says_what_to_do_and_can_be_repeated(
    hub: Hub, run: Path, failure: Failure, says: str, stage: str
) -> None:
    before = state_of(run)
    hub.fail = lambda request: failure if f"/{stage}" in request.path else None
    with pytest.raises(OSError, match=says) as caught:
        main([str(run), "--repo-id", "me/digits"])
    assert "Nothing local has changed" in str(caught.value)
    assert state_of(run) == before
    hub.fail = lambda _: None
    assert main([str(run), "--repo-id", "me/digits"]) == 0
    assert hub.commits_of("me/digits") == 1


def test_somebody_elses_commit_at_the_same_time(hub: Hub, run: Path) -> None:
    hub.fail = lambda request: Failure(409) if commits(request) else None
    with pytest.raises(OSError, match="Somebody else"):
        main([str(run), "--repo-id", "me/digits"])


def test_a_moments_failure_is_tried_again(hub: Hub, run: Path) -> None:
    """The client repeats uploads of large files by itself."""
    hub.uses_lfs = lambda path: path.endswith(".safetensors")
    left = iter([Failure(500), Failure(0)])
    hub.fail = lambda request: next(left, None) if request.path.startswith("/objects/") else None
    assert main([str(run), "--repo-id", "me/digits"]) == 0
    assert hub.commits_of("me/digits") == 1


def test_metadata_that_the_hub_refuses(hub: Hub, run: Path) -> None:
    hub.fail = lambda r: Failure(400, "datasets is not valid") if "validate-yaml" in r.path else None
    with pytest.raises(OSError, match=r"(?s)Invalid metadata.*hf-sage card"):
        main([str(run), "--repo-id", "me/digits"])
    assert not any(commits(request) for request in hub.requests)


def test_a_token_in_a_file_is_not_sent(hub: Hub, run: Path) -> None:
    """Stock Trainer pickles the token into training_args.bin."""
    model = AutoModelForImageClassification.from_pretrained(run / "model")
    Trainer(model, TrainingArguments(str(run / "model"), hub_token=TOKEN, use_cpu=True, report_to=[])).save_model()
    with pytest.raises(ValueError, match=r"training_args\.bin \(hf_s…cR\).*Nothing was uploaded") as caught:
        main([str(run), "--repo-id", "me/digits"])
    assert TOKEN not in str(caught.value)
    assert hub.requests == []


def test_a_local_path_in_a_configuration_is_cut_in_what_is_sent(hub: Hub, run: Path) -> None:
    file = run / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_name_or_path": "/home/ada/clip"}))
    before = state_of(run)
    assert main([str(run), "--repo-id", "me/digits"]) == 0
    assert state_of(run) == before
    assert json.loads(hub.repositories["me/digits"].files["config.json"])["_name_or_path"] == "clip"
    assert not any(b"/home/ada" in content for content in hub.uploads())


def test_what_cannot_be_pushed_is_told(hub: Hub, run: Path) -> None:
    for argv, says in (
        ([str(run), "--repo-id", "a/b/c"], "namespace/name"),
        ([str(run), "--repo-id", "me/x", "--license", "mine"], "'mine'"),
        ([str(run.parent), "--repo-id", "me/x"], r"no result\.json"),
    ):
        with pytest.raises(ValueError, match=says):
            main(argv)
    (run / "done").unlink()
    with pytest.raises(ValueError, match="not finished"):
        main([str(run), "--repo-id", "me/x"])
    (run / "done").touch()
    shutil.rmtree(run / "model")
    with pytest.raises(ValueError, match="no saved model"):
        main([str(run), "--repo-id", "me/x"])
    assert hub.requests == []


def test_without_a_network_the_offline_mode_is_named(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE"):
        main([str(run), "--repo-id", "me/digits"])
    assert hub.requests == []
