"""Model cards: what they say of a run, what they leave out, and what the checks find."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from hf_sage.benchmark.cards import card_of, facts_of, main, read_run
from hf_sage.methods import METHODS
from hf_sage.methods.citations import Citation
from hf_sage.publishing import CardFacts, Result, problems_of, render
from hf_sage.trainer.card import method_settings, results_of

WORKED = Path(__file__).parent.parent / "model_cards" / "style_digits"


@pytest.fixture
def run() -> dict[str, Any]:
    """A run that a test may change."""
    return copy.deepcopy(dict(read_run(WORKED / "run")))


def card(run: dict[str, Any], **given: Any) -> ModelCard:
    return ModelCard(render(facts_of(run, **given)), ignore_metadata_errors=False)


# ---- The worked card ----


def test_the_worked_card_is_current(tmp_path: Path) -> None:
    """If not: `hf-sage card model_cards/style_digits/run -o model_cards/style_digits/README.md`."""
    assert main([str(WORKED / "run"), "-o", str(tmp_path / "README.md")]) == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (WORKED / "README.md").read_text(encoding="utf-8")


def test_the_template_beside_the_cards_is_the_one_that_is_used() -> None:
    used = Path(__file__).parent.parent / "hf_sage" / "publishing" / "template.md"
    assert (WORKED.parent / "template.md").read_text(encoding="utf-8") == used.read_text(encoding="utf-8")


def test_it_says_what_the_run_measured(run: dict[str, Any]) -> None:
    worked = ModelCard((WORKED / "README.md").read_text(encoding="utf-8"), ignore_metadata_errors=False)
    measured = next(e for e in run["evaluations"] if e["step"] == run["model_step"])["accuracy"]
    by_domain = {result.dataset_config: result.metric_value for result in worked.data.eval_results}
    assert by_domain == {"sketch": measured["sketch"]["in"]}
    for domain in ("plain", "photo", "color"):
        assert f"| {domain} | trained on | validation | accuracy | {measured[domain]['out']:.4f} |" in worked.text
    for name, value in run["arguments"]["hyperparameters"].items():
        assert f"| `{name}` | {value:.6g} |" in worked.text
    assert run["data"]["fingerprint"] in worked.text
    assert worked.data.base_model is None  # it was trained from random weights
    assert worked.data.datasets is None  # its images are inside scikit-learn


# ---- What is said, and what is left out ----


def test_every_domain_has_an_entry_of_its_own(run: dict[str, Any]) -> None:
    """The Hub joins entries of one type, config and split, whatever their names."""
    run["arguments"]["held_out"] = ["sketch", "color"]
    written = card(run).data.to_dict()["model-index"][0]["results"]
    assert [r["dataset"]["config"] for r in written] == ["sketch", "color"]
    assert all(len(r["metrics"]) == 1 and "held out" in r["metrics"][0]["name"] for r in written)


def test_numbers_of_numpy_become_plain_ones() -> None:
    facts = CardFacts("m", "sage", dataset="d", results=[Result("photo", np.float32(0.5)), Result("art", np.int64(1))])  # type: ignore[arg-type]
    text = render(facts)
    assert "!!python" not in text
    assert [type(r.metric_value) for r in ModelCard(text).data.eval_results] == [float, float]


def test_a_number_that_is_none_stays_out_of_the_metadata() -> None:
    facts = CardFacts("m", "sage", dataset="d", results=[Result("photo", float("nan")), Result("art", 0.25)])
    assert [r.dataset_config for r in ModelCard(render(facts)).data.eval_results] == ["art"]
    assert "| photo |  | test | accuracy | nan |" in render(facts)


def test_names_of_the_hub_become_metadata(run: dict[str, Any]) -> None:
    run["arguments"] |= {"model": "openai/clip-vit-base-patch16", "head": "zero_shot", "dataset": "PACS"}
    run["data"] |= {"repo_id": "flwrlabs/pacs", "revision": "0" * 40}
    written = card(run, license="mit")
    assert problems_of(str(written)) == []
    assert (written.data.base_model, written.data.datasets) == ("openai/clip-vit-base-patch16", ["flwrlabs/pacs"])
    assert written.data.license == "mit"
    assert {r.dataset_type for r in written.data.eval_results} == {"flwrlabs/pacs"}
    assert {r.dataset_revision for r in written.data.eval_results} == {"0" * 40}
    assert "80 % in-split" in written.text


def test_local_paths_do_not_get_in(run: dict[str, Any], tmp_path: Path) -> None:
    run["arguments"] |= {"model": str(tmp_path / "clip"), "dataset": str(tmp_path / "my images")}
    run["arguments"]["training"] |= {"deepspeed": "/models/zero.json", "hub_token": "sw0rdf1sh"}
    text = render(facts_of(run))
    assert str(tmp_path) not in text
    assert "| `deepspeed` | zero.json |" in text
    assert "sw0rdf1sh" not in text
    assert problems_of(text) == []
    data = ModelCard(text).data
    assert (data.base_model, data.datasets) == (None, None)
    assert "my images" in text


@pytest.mark.parametrize(
    ("model_step", "says"),
    [(None, "nothing was chosen"), ("best", "training-domain validation"), ("worst", "are those after step 1 of 400")],
)
def test_the_selection_is_what_the_run_shows(run: dict[str, Any], model_step: str | None, says: str) -> None:
    levels = {"best": 0.99, "worst": 0.1, None: 0.99}
    first = copy.deepcopy(run["evaluations"][-1])
    first["step"] = 1
    for domain in first["accuracy"]:
        first["accuracy"][domain]["out"] = levels[model_step]
    run["evaluations"] = [first, run["evaluations"][-1]]
    run["model_step"] = None if model_step is None else 1
    selection = facts_of(run).selection
    assert selection is not None
    assert says in selection


def test_another_versions_defaults_are_not_claimed(run: dict[str, Any]) -> None:
    assert "polar_steps" in facts_of(run).method_settings
    run["versions"]["hf_sage"] = "0.0.1"
    assert dict(facts_of(run).method_settings) == {
        name: run["arguments"]["hyperparameters"][name] for name in ("rho", "gamma")
    }


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("irm", {"penalty": 100.0, "warmup": 500}),
        ("fish", {"meta_rate": 0.5}),
        ("look_sam", {"rho": 0.05, "alpha": 0.7, "ascent_interval": 5}),
    ],
)
def test_every_hyperparameter_of_a_method_is_told(name: str, settings: dict[str, Any]) -> None:
    assert method_settings(METHODS[name]()) == settings


def test_what_a_run_set_of_its_method_is_told_as_the_methods(run: dict[str, Any]) -> None:
    run["arguments"] |= {"method": "irm", "hyperparameters": {"learning_rate": 1e-3, "penalty": 3.0}}
    facts = facts_of(run)
    assert facts.method_settings == {"penalty": 3.0, "warmup": 500}
    assert facts.training_settings["learning_rate"] == 1e-3
    assert "penalty" not in facts.training_settings


def test_odd_names_survive(run: dict[str, Any]) -> None:
    run["arguments"]["held_out"] = ["Übung: 1"]
    odd = {"plain": "Real World", "photo": "a|b", "color": "Übung: 1"}
    for old, new in odd.items():
        run["data"]["rows"][new] = run["data"]["rows"].pop(old)
        for evaluation in run["evaluations"]:
            evaluation["accuracy"][new] = evaluation["accuracy"].pop(old)
    written = card(run)
    assert problems_of(str(written)) == []
    assert [r.dataset_config for r in written.data.eval_results] == ["Übung: 1"]
    assert "| a\\|b |" in written.text


def test_a_method_without_a_paper_has_a_card(run: dict[str, Any]) -> None:
    run["arguments"] |= {"method": "erm", "hyperparameters": {"learning_rate": 1e-3}}
    text = render(facts_of(run))
    assert problems_of(text) == []
    assert "## Citation" not in text


@pytest.mark.parametrize(
    ("entrant", "trained_with"), [("muon", "**ERM+MUON**."), ("sage+muon+swad", "**SAGE+MUON** and **SWAD**")]
)
def test_muon_is_named_as_the_optimizer(entrant: str, trained_with: str, run: dict[str, Any]) -> None:
    run["arguments"] |= {"method": entrant, "hyperparameters": {"learning_rate": 1e-3}}
    text = render(facts_of(run))
    assert problems_of(text) == []
    assert f"Trained with {trained_with.removesuffix('.')}" in text
    assert ("SWAD" in text) == entrant.endswith("swad")
    assert "| `optimizer` | Muon for hidden weight matrices, AdamW for the others |" in text


# ---- The log of a trainer ----


def test_metrics_by_domain_are_read_from_the_log_at_the_step() -> None:
    old = {"eval_photo_accuracy": 0.1, "eval_avg_accuracy": 0.1, "step": 1}
    now = {"eval_accuracy": 0.6, "eval_photo_accuracy": 0.5, "eval_photo_balanced_accuracy": 0.4, "step": 2}
    now |= {"eval_art_accuracy": 0.7, "eval_art_balanced_accuracy": 0.3, "eval_worst_accuracy": 0.5, "eval_loss": 1.0}
    now |= {"eval_avg_accuracy": 0.6, "eval_avg_balanced_accuracy": 0.35, "eval_worst_balanced_accuracy": 0.3}
    later = {"test_sketch_accuracy": 0.2, "test_avg_accuracy": 0.2, "step": 9}
    found = results_of([old, now, {"train_runtime": 1.0, "step": 9}, later], 2, ["photo", "art"])
    assert {(r.domain, r.metric, r.value, r.held_out, r.split) for r in found} == {
        ("photo", "accuracy", 0.5, False, "validation"),
        ("photo", "balanced_accuracy", 0.4, False, "validation"),
        ("art", "accuracy", 0.7, False, "validation"),
        ("art", "balanced_accuracy", 0.3, False, "validation"),
        ("sketch", "accuracy", 0.2, True, "test"),
    }


def test_a_dictionary_of_evaluation_sets_gives_its_names() -> None:
    log = [
        {"eval_day_accuracy": 0.5, "eval_day_cat_accuracy": 0.1, "eval_day_avg_accuracy": 0.5, "step": 3},
        {"eval_dusk_accuracy": 0.7, "eval_dusk_cat_accuracy": 0.1, "eval_dusk_avg_accuracy": 0.7, "step": 3},
        {"eval_avg_accuracy": 0.6, "eval_worst_accuracy": 0.5, "eval_avg_loss": 1.0, "eval_day_loss": 1.0, "step": 3},
    ]
    assert {(r.domain, r.value, r.held_out) for r in results_of(log, 3, [])} == {
        ("day", 0.5, None),
        ("dusk", 0.7, None),
    }


# ---- The checks ----


def with_metadata(lines: str, text: str = "A card.") -> str:
    return f"---\n{lines}\n---\n{text}\n"


def index(value: str, config: str = "photo") -> str:
    dataset = f"dataset: {{type: d, name: D, config: {config}}}"
    return (
        f"- task: {{type: image-classification}}\n    {dataset}\n    metrics:\n    - {{type: accuracy, value: {value}}}"
    )


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (with_metadata("base_model: /models/clip"), "base_model"),
        (with_metadata("base_model: ../runs/checkpoint-5"), "base_model"),
        (with_metadata("datasets: [ok/fine, ./images]"), "'./images'"),
        (with_metadata("license: mine"), "'mine'"),
        (with_metadata("license: other"), "license_name"),
        (with_metadata("license: mit", "See /home/ada/runs/3."), "/home/ada/runs/3"),
        (with_metadata("license: mit", "Token: hf_" + "a" * 34), "revoke"),
        (with_metadata("model-index:\n- name: m\n  results:\n  " + index(".nan")), "finite"),
        (with_metadata("model-index:\n- name: m\n  results:\n  " + index("'0.9'")), "finite"),
        (with_metadata("model-index:\n- name: m\n  results:\n  - task: {type: x}"), "cannot be read"),
        (with_metadata(f"model-index:\n- name: m\n  results:\n  {index('1.0')}\n  {index('2.0')}"), "two values"),
        (with_metadata("license: [mit"), "cannot be read"),
        (with_metadata("value: !!python/object/apply:numpy._core.multiarray.scalar []"), "cannot be read"),
    ],
)
def test_what_the_hub_would_refuse_is_found(broken: str, says: str) -> None:
    assert any(says in problem for problem in problems_of(broken)), problems_of(broken)


def test_a_good_card_has_no_problems() -> None:
    good = "license: apache-2.0\nbase_model: openai/clip-vit-base-patch16\ndatasets: [flwrlabs/pacs]\n"
    good += f"model-index:\n- name: m\n  results:\n  {index('0.9')}\n  {index('0.5', 'sketch')}"
    assert problems_of(with_metadata(good, "https://arxiv.org/data/x and a/b.")) == []


# ---- The command ----


def test_the_command_prints_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(WORKED / "run"), "--name", "digits", "--license", "mit"]) == 0
    printed = capsys.readouterr().out
    assert "\n# digits\n" in printed
    assert ModelCard(printed).data.license == "mit"


def test_bad_runs_and_options_are_told(tmp_path: Path, run: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no result\.json"):
        card_of(tmp_path)
    file = tmp_path / "result.json"
    for content, says in (
        ("{", "no JSON"),
        (json.dumps({"format": 7}), "format 1"),
        (json.dumps({"format": 1}), "lacks arguments"),
        (json.dumps(run | {"model_step": 12345}), "not evaluated"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=says):
            card_of(tmp_path)
    with pytest.raises(ValueError, match="'mine'"):
        card_of(WORKED / "run", license="mine")


@pytest.mark.parametrize("method", METHODS)
def test_every_published_method_is_cited(method: str, run: dict[str, Any]) -> None:
    run["arguments"] |= {"method": method, "hyperparameters": {"learning_rate": 1e-3}}
    text = card(run).text
    cited = Citation.of(METHODS[method])
    if cited.arxiv is not None:
        assert f"https://arxiv.org/abs/{cited.arxiv}" in text
    assert ("ballas2026sage" in text) == method.startswith("sage")
