"""`trainer.push_to_hub()` and the pushes during training, with the real client, over HTTP, to a server of the tests."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from hub_server import Failure, Hub, Request, point_client_at, serve
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForImageClassification, CLIPTokenizer, Trainer, TrainingArguments

from hf_sage import SAGEConfig, SAGEMixin, SAGETrainer
from hf_sage.metrics import accuracy
from hf_sage.models import tiny_clip
from hf_sage.publishing import problems_of
from hf_sage.publishing.failures import TRANSPORT_ERROR
from hf_sage.publishing.privacy import is_local_path, secrets_in, veiled

TOKEN = "hf_" + ("sEcReT" * 6)[:34]
DOMAINS = ["photo", "sketch"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as hub:
        point_client_at(hub, monkeypatch, tmp_path / "cache", token=None)
        yield hub


def rows(domains: list[str]) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    count = 4 * len(domains)
    return Dataset.from_dict(
        {
            "pixel_values": torch.randn(count, 3, 16, 16, generator=generator).tolist(),
            "labels": [i % 2 for i in range(count)],
            "domain": [i % len(domains) for i in range(count)],
        },
        features=Features(
            pixel_values=Sequence(Sequence(Sequence(Value("float32")))),
            labels=Value("int64"),
            domain=ClassLabel(names=domains),
        ),
    ).with_format("torch", columns=["pixel_values", "labels"], output_all_columns=True)


def build(folder: Path, model: Any = None, kind: type[Trainer] = SAGETrainer, **options: Any) -> Any:
    torch.manual_seed(0)
    fresh, processor = tiny_clip(["cat", "dog"])
    fields: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "hub_model_id": "me/clip-sage",
        "hub_token": TOKEN,
        "rho": 1e-3,
        "gamma": 1e-4,
    }
    return kind(
        fresh if model is None else model,
        SAGEConfig(str(folder), **fields | options),
        train_dataset=rows(DOMAINS),
        eval_dataset=rows(["art", *DOMAINS]),
        processing_class=processor,
        compute_metrics=accuracy,
    )


def everything_in(uploads: list[bytes]) -> Iterator[bytes]:
    """The uploads, and the members of those that are zip archives, which is what torch.save writes."""
    for upload in uploads:
        yield upload
        if zipfile.is_zipfile(io.BytesIO(upload)):
            with zipfile.ZipFile(io.BytesIO(upload)) as archive:
                yield from map(archive.read, archive.namelist())


def assert_nothing_leaks(hub: Hub, folder: Path) -> None:
    seen = list(everything_in(hub.uploads()))
    assert any(b"SAGEConfig" in content for content in seen), "the arguments were not looked into"
    for secret in (TOKEN, str(folder.parent), str(Path.cwd()), str(Path.home()) + "/"):
        assert not any(secret.encode() in content for content in seen), secret


# ---- The round trip ----


def test_what_is_pushed_loads_with_the_same_bits(hub: Hub, tmp_path: Path) -> None:
    trainer = build(tmp_path / "out")
    trainer.train()
    trainer.push_to_hub()
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "training_args.bin"} <= set(
        hub.repositories["me/clip-sage"].files
    )
    assert {r.token for r in hub.requests if "/commit/" in r.path} == {TOKEN}  # it did log in
    assert_nothing_leaks(hub, tmp_path)
    images = torch.randn(3, 3, 16, 16)
    loaded = AutoModelForImageClassification.from_pretrained("me/clip-sage").eval()
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, trainer.model.eval()(images).logits)


def test_another_process_loads_it_by_its_name(hub: Hub, tmp_path: Path) -> None:
    trainer = build(tmp_path / "out")
    trainer.push_to_hub()
    images = torch.randn(3, 3, 16, 16)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForImageClassification as M, CLIPImageProcessorPil as P\n"
        "P.from_pretrained('me/clip-sage'); m = M.from_pretrained('me/clip-sage').eval()\n"
        "torch.save(m(torch.load(sys.argv[1] + '/images.pt')).logits.detach(), sys.argv[1] + '/logits.pt')"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment | {"OMP_NUM_THREADS": "1"})
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), trainer.model.eval()(images).logits)


def test_a_second_push_of_the_same_commits_nothing(hub: Hub, tmp_path: Path) -> None:
    trainer = build(tmp_path / "out")
    trainer.push_to_hub()
    trainer.push_to_hub()
    assert hub.commits_of("me/clip-sage") == 1


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_pushes_during_training(hub: Hub, tmp_path: Path, strategy: str) -> None:
    hub.uses_lfs = lambda path: path.endswith((".safetensors", ".pt", ".bin"))
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    best |= {"metric_for_best_model": "accuracy", "per_device_eval_batch_size": 12}
    saving = {"push_to_hub": True, "hub_strategy": strategy, "hub_always_push": True, "save_strategy": "steps"}
    trainer = build(tmp_path / "out", **saving, save_steps=1, **best)
    trainer.train()
    files = hub.repositories["me/clip-sage"].files
    assert {"README.md", "model.safetensors", "training_args.bin"} <= set(files)
    checkpoints = {path.split("/")[0] for path in files if "/" in path}
    expected = {"every_save": set(), "checkpoint": {"last-checkpoint"}}
    assert checkpoints == expected.get(strategy, {"checkpoint-1", "checkpoint-2"})
    assert any(r.path.startswith("/objects/") for r in hub.requests)  # by LFS, whose bytes are searched too
    assert_nothing_leaks(hub, tmp_path)
    assert problems_of(files["README.md"].decode()) == []


def test_a_tokenizer_and_a_config_from_a_local_checkpoint_name_no_path(hub: Hub, tmp_path: Path) -> None:
    letters = [chr(i) for i in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(tmp_path / "local")
    tiny_clip(["cat", "dog"])[0].save_pretrained(tmp_path / "local")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "local")
    trainer = build(tmp_path / "out", model, push_to_hub=True, save_strategy="steps", save_steps=1)
    trainer.processing_class = CLIPTokenizer.from_pretrained(tmp_path / "local")
    model.config.adapter_of = str(tmp_path / "adapters" / "lora")  # as PEFT writes its base model
    trainer.train()
    trainer.push_to_hub()
    assert_nothing_leaks(hub, tmp_path)
    assert json.loads(hub.repositories["me/clip-sage"].files["config.json"])["adapter_of"] == "lora"
    assert model.config.adapter_of == str(tmp_path / "adapters" / "lora")


# ---- Secrets ----


def test_saved_arguments_are_the_arguments_without_secrets(tmp_path: Path) -> None:
    trainer = build(tmp_path / "out", optim_args="a=1", accelerator_config={"split_batches": False})
    trainer.save_model()
    assert trainer.args.hub_token == TOKEN
    assert type(trainer.args.hub_token) is str  # nothing of the guard is left in the user's arguments
    saved = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert type(saved) is SAGEConfig
    assert saved.hub_token is None
    own, theirs = trainer.args.to_dict(), saved.to_dict()
    assert {name for name in own if own[name] != theirs[name]} == {"output_dir"}
    assert theirs["output_dir"] == "out"


def test_stock_trainer_leaks_what_ours_does_not(tmp_path: Path) -> None:
    """The trap itself: where transformers has mended it, the guard can go."""
    stock = Trainer(tiny_clip(["a", "b"])[0], TrainingArguments(str(tmp_path), hub_token=TOKEN, use_cpu=True))
    stock.save_model()
    content = (tmp_path / "training_args.bin").read_bytes()
    assert any(TOKEN.encode() in part for part in everything_in([content]))


def test_secrets_are_known_by_name_or_by_look_at_any_depth() -> None:
    import pickle
    from types import SimpleNamespace

    secret = "sw0rdf1sh"
    given = SimpleNamespace(
        push_to_hub_token=secret,
        eos_token="</s>",
        model_init_kwargs={"token": secret, "revision": "main", "headers": [{"api_key": secret}]},
        note=f"use {TOKEN}",
        output_dir="/home/ada/out",
        relative="out/here",
        steps=3,
    )
    twin = veiled(given)
    assert vars(twin) == vars(given)  # it reads the same
    shown = pickle.loads(pickle.dumps(twin))
    assert shown == SimpleNamespace(
        push_to_hub_token=None,
        eos_token="</s>",
        model_init_kwargs={"token": None, "revision": "main", "headers": [{"api_key": None}]},
        note=None,
        output_dir="out",
        relative="out/here",
        steps=3,
    )
    assert pickle.loads(pickle.dumps(given)) == given  # the original is untouched


def test_a_token_is_found_inside_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", b"\x80\x05X%\0\0\0" + TOKEN.encode() + b"q\x01")
    assert TOKEN.encode() not in (tmp_path / "a.bin").read_bytes()
    assert secrets_in(tmp_path / "a.bin") == [f"hf_s…{TOKEN[-2:]}"]
    (tmp_path / "empty").touch()
    assert secrets_in(tmp_path / "empty") == []


def test_what_is_a_local_path() -> None:
    assert all(map(is_local_path, ["/home/ada/x", "~/models/clip", "/m"]))
    assert not any(map(is_local_path, ["openai/clip-vit", "out/run", "https://hf.co/x", "/", "", "/a\nb"]))


# ---- Failures ----


def commits(request: Request) -> bool:
    return "/commit/" in request.path


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (Failure(401), "hf auth login"),
        (Failure(403), "write permission"),
        (Failure(409), "Do it again"),
        (Failure(500), "what has arrived in me/clip-sage is not sent again"),
        (Failure(0), "Check the network"),
    ],
)
def test_a_failed_push_loses_nothing_and_says_what_to_do(hub: Hub, tmp_path: Path, failure: Failure, says: str) -> None:
    trainer = build(tmp_path / "out")
    trainer.train()
    hub.fail = lambda request: failure if commits(request) else None
    with pytest.raises((HfHubHTTPError, TRANSPORT_ERROR)) as caught:
        trainer.push_to_hub()
    assert any(says in note and str(tmp_path / "out") in note for note in caught.value.__notes__)
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), trainer.model.parameters(), strict=True))
    hub.fail = lambda _: None
    trainer.push_to_hub()
    assert hub.commits_of("me/clip-sage") == 1


def test_a_card_that_the_hub_refuses(hub: Hub, tmp_path: Path) -> None:
    hub.fail = lambda r: Failure(400, "base_model is not valid") if "validate-yaml" in r.path else None
    with pytest.raises(ValueError, match="Invalid metadata") as caught:
        build(tmp_path / "out").push_to_hub()
    assert "hf-sage card" in caught.value.__notes__[0]


def test_a_card_of_ours_that_the_hub_would_refuse_is_not_sent(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no repository on the Hub"):
        build(tmp_path / "out").push_to_hub(finetuned_from="/models/clip/base")
    assert not any(commits(request) for request in hub.requests)


def test_no_access_is_said_before_training(hub: Hub, tmp_path: Path) -> None:
    hub.fail = lambda _: Failure(401)
    with pytest.raises(HfHubHTTPError) as caught:
        build(tmp_path / "out", push_to_hub=True)
    assert "hf auth login" in caught.value.__notes__[0]


def test_a_failed_push_during_training_is_said_and_training_goes_on(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail = lambda request: Failure(500) if commits(request) else None
    trainer = build(tmp_path / "out", push_to_hub=True, save_strategy="steps", save_steps=1, hub_always_push=True)
    with caplog.at_level(logging.WARNING, logger="hf_sage"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert "trainer.push_to_hub()" in caplog.text
    hub.fail = lambda _: None
    trainer.push_to_hub()
    assert caplog.text.count("An upload during training failed") == 2  # each said once
    assert "model.safetensors" in hub.repositories["me/clip-sage"].files


@pytest.mark.usefixtures("hub")
def test_a_pushed_checkpoint_resumes_with_its_best(tmp_path: Path) -> None:
    """A pushed state has no path; the best checkpoint is found beside the others."""
    options: dict[str, Any] = {"push_to_hub": True, "hub_strategy": "checkpoint", "load_best_model_at_end": True}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    build(tmp_path / "out", **options, max_steps=2).train()
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    best = f"checkpoint-{state['best_global_step']}"
    assert state["best_model_checkpoint"] == best
    resumed = build(tmp_path / "out", **options, max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.state.best_model_checkpoint == str(tmp_path / "out" / best)


# ---- The card ----


def test_the_card_says_what_the_trainer_knows(hub: Hub, tmp_path: Path) -> None:
    trainer = build(tmp_path / "out")
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub(dataset_tags="me/domains", license="mit", tags="toy")
    card = ModelCard(hub.repositories["me/clip-sage"].files["README.md"].decode())
    data = card.data
    assert problems_of(str(card)) == []
    assert data.base_model is None  # random weights: nothing was fine-tuned
    assert (data.license, data.datasets, data.pipeline_tag) == ("mit", ["me/domains"], "image-classification")
    assert data.model_name == "clip-sage"
    assert {"hf_sage", "sage", "toy"} <= set(data.tags)
    logged = trainer.state.log_history[-1]
    (result,) = data.eval_results  # that of the one domain which was not trained on
    assert (result.dataset_config, result.metric_value) == ("art", logged["eval_art_accuracy"])
    assert f"| photo | trained on | validation | accuracy | {logged['eval_photo_accuracy']:.4f} |" in card.text
    for said in ("| `rho` | 0.001 |", "| `gamma` | 0.0001 |", "| `polar_steps` | 5 |", "arxiv.org/abs/2605.07914"):
        assert said in card.text


def test_the_base_model_is_named_where_it_came_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    build(tmp_path / "base", hub_model_id="me/base").push_to_hub()
    model = AutoModelForImageClassification.from_pretrained("me/base")
    build(tmp_path / "out", model).push_to_hub()
    data = ModelCard(hub.repositories["me/clip-sage"].files["README.md"].decode()).data
    assert data.base_model == "me/base"


def test_a_base_with_a_card_of_its_own_keeps_it(tmp_path: Path) -> None:
    """As those of TRL and sentence-transformers do, which take fewer arguments."""

    class OwnCard(Trainer):
        def create_model_card(self, model_name: str | None = None, tags: list[str] | None = None) -> None:
            (Path(self.args.output_dir) / "README.md").write_text(f"{model_name} {tags}")

    class SAGEOwnCard(SAGEMixin, OwnCard): ...

    trainer = build(tmp_path / "out", kind=SAGEOwnCard)
    trainer.save_model()
    trainer.create_model_card(model_name="m")
    assert (tmp_path / "out" / "README.md").read_text() == "m ['hf_sage', 'sage']"


def test_without_a_dataset_or_an_evaluation_the_card_claims_neither(tmp_path: Path) -> None:
    trainer = build(tmp_path / "out", method="erm", rho=None, gamma=None)
    trainer.create_model_card()
    text = (tmp_path / "out" / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.eval_results, data.datasets, data.license) == (None, None, None)
    assert "## Results" not in text
    assert "were not evaluated" in text


def test_a_local_base_that_is_gone_is_not_taken_for_one_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_clip(["cat", "dog"])[0].save_pretrained("runs/base")
    model = AutoModelForImageClassification.from_pretrained("runs/base")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    build(tmp_path / "out", model).create_model_card()
    assert ModelCard((tmp_path / "out" / "README.md").read_text()).data.base_model is None
