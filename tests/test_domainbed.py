"""DomainBed's datasets: what is declared, folders and copies on the Hub in one form, and splits to the index."""

from __future__ import annotations

import dataclasses
import shutil
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pytest
from pictures import PACS_CLASSES, PACS_DOMAINS, folders, hub_folder, hub_rows, png

from hf_sage.benchmark.domainbed import TEST_CONVENTIONS, domainbed_split, environments, seed_hash
from hf_sage.data import CAMELYON17, DATASETS, decode_image, domain_counts, domain_names, load_domains
from hf_sage.data import hub as hub_module
from hf_sage.data import load as load_module

# ---- What is declared ----


def test_declarations_agree_with_themselves() -> None:
    assert list(DATASETS) == ["PACS", "VLCS", "OfficeHome", "TerraIncognita", "DomainNet"]
    for dataset in (*DATASETS.values(), CAMELYON17):
        assert list(dataset.domains) == sorted(dataset.domains)  # DomainBed's environments are sorted folders
        assert list(dataset.classes) == sorted(dataset.classes)
        assert len(dataset.classes) in (0, dataset.class_count)
        if dataset.counts:
            assert tuple(dataset.counts) == dataset.domains
            assert sum(dataset.counts.values()) == dataset.total
        assert dataset.citation
        assert dataset.license


def test_differences_say_exactly_what_differs() -> None:
    pacs = DATASETS["PACS"]
    assert pacs.differences(pacs.domains, pacs.classes, pacs.counts) == []
    counts = {"art_painting": 2_048, "cartoon": 2_343, "photo": 1_670, "clipart": 7}
    classes = [*PACS_CLASSES[1:], "cat"]
    assert pacs.differences(counts, classes, counts) == [
        "domain 'sketch' is missing",
        "domain 'clipart' is not declared",
        "class 'dog' is missing",
        "class 'cat' is not declared",
        "2,343 images in 'cartoon' instead of 2,344",
    ]
    office = DATASETS["OfficeHome"]
    assert office.differences(office.domains, ["a"] * 64, office.counts) == ["64 classes instead of 65"]
    terra = DATASETS["TerraIncognita"]
    found = dict(zip(terra.domains, (24_327, 1, 1, 1), strict=True))
    assert terra.differences(found, terra.classes, found) == ["24,330 images instead of 24,788"]


# ---- DomainBed's folders ----


@pytest.fixture
def pacs_folder(tmp_path: Path) -> Path:
    """DomainBed's data directory with a PACS of 56 images."""
    folders(tmp_path / "PACS", PACS_DOMAINS, PACS_CLASSES)
    return tmp_path


@pytest.fixture
def small_pacs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Declares a PACS of 14 images a domain."""
    small = dataclasses.replace(DATASETS["PACS"], counts=dict.fromkeys(PACS_DOMAINS, 14), total=56)
    monkeypatch.setitem(load_module.DECLARED, "PACS", small)


@pytest.mark.usefixtures("small_pacs")
def test_folders_as_declared_load_without_a_word(pacs_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = load_domains("PACS", root=pacs_folder)
    assert data.features["domain"].names == PACS_DOMAINS
    assert data.features["label"].names == PACS_CLASSES
    assert domain_counts(data) == dict.fromkeys(PACS_DOMAINS, 14)
    assert data.features["image"].decode is False
    paths = [image["path"] for image in data["image"]]
    assert paths == sorted(paths)  # DomainBed's order within a domain, which its splits are of
    assert caplog.text == ""


def test_counts_that_differ_stop_or_warn(pacs_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"14 images in 'sketch' instead of 3,929.*on_mismatch='warn'"):
        load_domains("PACS", root=pacs_folder)
    assert len(load_domains("PACS", root=pacs_folder, on_mismatch="warn")) == 56
    assert "14 images in 'sketch' instead of 3,929" in caplog.text


@pytest.mark.usefixtures("small_pacs")
def test_stray_folders_are_reported_and_are_no_domains(pacs_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders(pacs_folder / "PACS", ["__MACOSX"], PACS_CLASSES)
    (pacs_folder / "PACS" / "splits").mkdir()
    (pacs_folder / "PACS" / "splits" / "train.txt").write_text("art_painting/dog/0.png 1")
    data = load_domains("PACS", root=pacs_folder)
    assert data.features["domain"].names == PACS_DOMAINS
    assert "'__MACOSX'" in caplog.text
    assert "'splits'" in caplog.text


def test_missing_class_shifts_no_label(pacs_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """torchvision's ImageFolder numbers the classes of each domain by itself: there "elephant" of photo would be 0."""
    for domain in PACS_DOMAINS:
        shutil.rmtree(pacs_folder / "PACS" / domain / "guitar")  # in no domain at all
    shutil.rmtree(pacs_folder / "PACS" / "photo" / "dog")
    data = load_domains("PACS", root=pacs_folder, on_mismatch="warn")
    assert data.features["label"].names == PACS_CLASSES
    for row in data:
        assert Path(row["image"]["path"]).parent.name == PACS_CLASSES[row["label"]]
    assert "class 'guitar' is missing" in caplog.text
    assert "'photo' has no dog" in caplog.text


def test_missing_and_extra_domains_are_named(pacs_folder: Path) -> None:
    (pacs_folder / "PACS" / "sketch").rename(pacs_folder / "PACS" / "sketches")
    with pytest.raises(ValueError, match="domain 'sketch' is missing; domain 'sketches' is not declared"):
        load_domains("PACS", root=pacs_folder)
    data = load_domains("PACS", root=pacs_folder, on_mismatch="warn")
    assert domain_names(data) == ["art_painting", "cartoon", "photo", "sketches"]


def test_folder_of_the_archive_s_own_name_is_explained(tmp_path: Path) -> None:
    (tmp_path / "kfold").mkdir()
    with pytest.raises(ValueError, match="unpacks as `kfold`"):
        load_domains("PACS", root=tmp_path)


def test_environments_of_terra_are_sorted_as_text(tmp_path: Path) -> None:
    terra = DATASETS["TerraIncognita"]
    folders(tmp_path / "terra_incognita", ["location_38", "location_100", "location_46", "location_43"], terra.classes)
    data = load_domains("TerraIncognita", root=tmp_path, on_mismatch="warn")
    assert list(environments(data, 0)) == ["location_100", "location_38", "location_43", "location_46"]


# ---- Copies on the Hub ----

PACS_STRINGS = {"domains": ["sketch", "photo", "art_painting", "cartoon"], "domain_feature": datasets.Value("string")}
PACS_INTEGERS = {
    "domains": [0, 1, 2, 3],
    "domain_feature": datasets.ClassLabel(names=["photo", *PACS_DOMAINS[:2], "sketch"]),
}
PACS_SPELLED = {
    "domains": [0, 1, 2, 3],
    "domain_feature": datasets.ClassLabel(names=["Photo", "Art Painting", "Cartoon", "Sketch"]),
}


@pytest.mark.usefixtures("small_pacs")
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("form", [PACS_STRINGS, PACS_INTEGERS, PACS_SPELLED], ids=["string", "ClassLabel", "spelled"])
def test_hub_copy_comes_in_the_form_of_the_folders(
    form: dict, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Domains in the declared order and classes sorted, whatever numbers the copy gives them."""
    rows = hub_rows(**form, classes=PACS_CLASSES[::-1])
    call = intercept(monkeypatch, hub_folder(tmp_path / "copy", {"train": rows}))
    data = load_domains("PACS", streaming=streaming, revision="0123abc")
    assert call == [("flwrlabs/pacs", {"split": "train", "streaming": streaming, "revision": "0123abc"})]
    assert isinstance(data, datasets.IterableDataset if streaming else datasets.Dataset)
    assert data.features["domain"].names == PACS_DOMAINS
    assert data.features["label"].names == PACS_CLASSES
    feature = form["domain_feature"]
    for got, given in zip(data, rows, strict=True):
        name = feature.int2str(given["domain"]) if isinstance(feature, datasets.ClassLabel) else given["domain"]
        assert PACS_DOMAINS[got["domain"]] == name.lower().replace(" ", "_")
        assert PACS_CLASSES[got["label"]] == PACS_CLASSES[::-1][given["label"]]
        assert decode_image(got["image"]).tobytes() == decode_image(given["image"]).tobytes()
        assert set(got) == {"image", "label", "domain"}


@pytest.mark.parametrize("streaming", [False, True])
def test_domain_net_is_read_whole_at_its_pinned_revision(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = DATASETS["DomainNet"]
    numbers = datasets.ClassLabel(names=["sketch", *declared.domains[:-1]])
    rows = hub_rows(list(range(6)), numbers, ["axe", "zebra"], images=1)
    call = intercept(monkeypatch, hub_folder(tmp_path / "copy", {"train": rows, "test": rows}))
    data = load_domains("DomainNet", streaming=streaming, on_mismatch="warn")
    pinned = {"streaming": streaming, "revision": "ee20570ae7a29c51571e55a9a17983f7625295d6"}
    assert call == [("wltjr1007/DomainNet", {"split": split} | pinned) for split in ("train", "test")]
    assert [row["domain"] for row in data] == 2 * [i for i in (5, 0, 1, 2, 3, 4) for _ in range(2)]
    with pytest.raises(ValueError, match="2 classes instead of 345"):
        load_domains("DomainNet", streaming=streaming)


def intercept(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list:
    """Answers `load_dataset` from a folder; returns the list that will hold what was asked."""
    asked, load_dataset = [], datasets.load_dataset

    def answer(repo_id: str, revision: str | None = None, **options):
        asked.append((repo_id, options | {"revision": revision}))
        return load_dataset(str(folder), **options)

    monkeypatch.setattr(hub_module.datasets, "load_dataset", answer)
    return asked


@pytest.mark.usefixtures("small_pacs")
def test_folder_of_the_copy_s_own_files_is_read_by_path(tmp_path: Path) -> None:
    hub_folder(tmp_path / "PACS", {"train": hub_rows(**PACS_STRINGS, classes=PACS_CLASSES)})
    data = load_domains("PACS", root=tmp_path)
    assert domain_counts(data) == dict.fromkeys(PACS_DOMAINS, 14)


def test_unpinned_copy_is_said_to_be_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    intercept(monkeypatch, hub_folder(tmp_path / "copy", {"train": hub_rows(**PACS_STRINGS, classes=PACS_CLASSES)}))
    load_domains("PACS", on_mismatch="warn")
    assert "No revision of flwrlabs/pacs is declared" in caplog.text


def test_numbers_without_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies number the same domains differently, so that a number alone says nothing."""
    rows = hub_rows([0, 1, 2, 3], datasets.Value("int64"), PACS_CLASSES)
    intercept(monkeypatch, hub_folder(tmp_path / "copy", {"train": rows}))
    with pytest.raises(ValueError, match="'domain' holds int64 without names"):
        load_domains("PACS")


def test_domain_of_a_stream_that_nobody_declared_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = hub_rows(["photo", "mosaic"], datasets.Value("string"), PACS_CLASSES)
    intercept(monkeypatch, hub_folder(tmp_path / "copy", {"train": rows}))
    with pytest.raises(ValueError, match="'mosaic'; known are 'art_painting'"):
        list(load_domains("PACS", streaming=True))


@pytest.mark.parametrize("name", ["VLCS", "TerraIncognita"])
def test_sets_without_a_reliable_copy_ask_for_folders(name: str) -> None:
    with pytest.raises(ValueError, match=rf"<root>/{DATASETS[name].folder}/<domain>/<class>"):
        load_domains(name)


def test_hub_out_of_reach_says_how_to_read_folders() -> None:
    with pytest.raises(ValueError, match="by root"):
        load_domains("PACS")


def test_streaming_is_refused_where_there_is_nothing_to_stream(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="streaming=True is for PACS"):
        load_domains(str(tmp_path), streaming=True)


def test_unreadable_images_of_a_stream_are_skipped_when_their_turn_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = hub_rows(**PACS_STRINGS, classes=PACS_CLASSES).cast_column("image", datasets.Image(decode=False))
    broken = rows.to_dict()
    broken["image"][3] = {"bytes": png()[:40], "path": "third.png"}
    rows = datasets.Dataset.from_dict(broken, features=rows.features)
    intercept(monkeypatch, hub_folder(tmp_path / "copy", {"train": rows}))
    data = load_domains("PACS", streaming=True, on_bad_image="skip")
    assert len(list(data)) == 55
    assert "third.png" in caplog.text


# ---- Splits to the index ----

SEEDS = {  # trial seed -> seeds of environments 0 to 5
    0: (894182419, 1514274641, 1325548499, 1796103049, 1773288162, 1833038383),
    1: (785910682, 1442673865, 1981683110, 1739848239, 582996474, 65219121),
    2: (472130416, 181139023, 248334461, 1709828778, 402558190, 941488192),
}
FIRST_OUT = (  # of PACS in trial 0: images, size of the out-split, its first five
    (2048, 409, [548, 677, 1997, 977, 1553]),
    (2344, 468, [1488, 562, 461, 570, 2092]),
    (1670, 334, [1441, 1432, 282, 669, 637]),
    (3929, 785, [2743, 2083, 2744, 3449, 1159]),
)


def test_seeds_and_splits_are_those_of_domainbed() -> None:
    for trial, seeds in SEEDS.items():
        assert tuple(seed_hash(trial, env) for env in range(6)) == seeds
    for env, (n, size, first) in enumerate(FIRST_OUT):
        inside, outside = domainbed_split(n, 0, env)
        assert outside[:5] == first
        assert len(outside) == size
        assert sorted(inside + outside) == list(range(n))


def test_split_is_the_same_for_every_kind_of_integer() -> None:
    assert domainbed_split(50, np.int64(1), np.int32(2)) == domainbed_split(50, 1, 2)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2])
def test_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        domainbed_split(10, 0, 0, fraction)


@pytest.fixture
def mixed() -> datasets.Dataset:
    """Three domains of 10, 20 and 30 rows, one row of each in turn."""
    domains = [d for i in range(30) for d, n in (("b", 20), ("a", 10), ("c", 30)) if i < n]
    return datasets.Dataset.from_dict({"domain": domains, "row": range(60), "label": [0] * 60})


def test_environments_split_the_rows_of_each_domain(mixed: datasets.Dataset) -> None:
    found = environments(mixed, trial_seed=2)
    assert [(name, env.name, env.index) for name, env in found.items()] == [("a", "a", 0), ("b", "b", 1), ("c", "c", 2)]
    for name, env in found.items():
        own = [row for row, domain in zip(mixed["row"], mixed["domain"], strict=True) if domain == name]
        inside, outside = domainbed_split(len(own), 2, env.index)
        assert env.inside["row"][:] == [own[i] for i in inside]
        assert env.outside["row"][:] == [own[i] for i in outside]
        assert env.whole["row"][:] == own


def test_environments_do_not_depend_on_the_kind_of_the_domain_column(mixed: datasets.Dataset) -> None:
    as_labels = environments(mixed.class_encode_column("domain"), 0)
    for name, env in environments(mixed, 0).items():
        assert as_labels[name].inside["row"][:] == env.inside["row"][:]


def test_conventions_test_on_different_rows(pacs_folder: Path, tmp_path: Path) -> None:
    data = load_domains("PACS", root=pacs_folder, on_mismatch="warn")
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "sketch_test_kfold.txt").write_text("sketch/house/1.png 6\nsketch/dog/0.png 1\n")
    (lists / "sketch_train_kfold.txt").write_text("sketch/dog/1.png 1\n")
    sketch = environments(data, 0, official_lists=lists)["sketch"]
    assert TEST_CONVENTIONS == ("in_split", "full", "official")
    assert sketch.test()["image"][:] == sketch.inside["image"][:]
    assert {c: len(sketch.test(c)) for c in TEST_CONVENTIONS} == {"in_split": 12, "full": 14, "official": 2}
    names = ["/".join(Path(image["path"]).parts[-3:]) for image in sketch.test("official")["image"]]
    assert names == ["sketch/dog/0.png", "sketch/house/1.png"]


def test_official_lists_are_asked_for_and_checked(pacs_folder: Path, tmp_path: Path) -> None:
    data = load_domains("PACS", root=pacs_folder, on_mismatch="warn")
    photo = environments(data, 0)["photo"]
    with pytest.raises(ValueError, match="official_lists"):
        photo.test("official")
    with pytest.raises(ValueError, match="'in_split', 'full', 'official'"):
        photo.test("all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="No text file"):
        environments(data, 0, official_lists=tmp_path)
    (tmp_path / "photo_test.txt").write_text("photo/dog/77.png 1\n")
    with pytest.raises(ValueError, match=r"photo/dog/77\.png"):
        environments(data, 0, official_lists=tmp_path)


def test_domain_too_small_to_split_is_named(mixed: datasets.Dataset) -> None:
    one = datasets.concatenate_datasets(
        [mixed, datasets.Dataset.from_dict({"domain": ["d"], "row": [60], "label": [0]})]
    )
    with pytest.raises(ValueError, match=r"'d' has 1 image"):
        environments(one, 0)


def test_stream_cannot_be_split(mixed: datasets.Dataset) -> None:
    with pytest.raises(ValueError, match="without streaming"):
        environments(mixed.to_iterable_dataset(), 0)


# ---- Folders in general ----


def test_one_class_written_in_two_ways_is_refused(tmp_path: Path) -> None:
    folders(tmp_path, ["day"], ["alarm clock", "dog"])
    folders(tmp_path, ["night"], ["Alarm_Clock", "dog"])
    with pytest.raises(ValueError, match="'Alarm_Clock' and 'alarm clock'"):
        load_domains(str(tmp_path))
    folders(tmp_path, ["night"], ["alarm clock"])  # a domain that has both means two classes
    assert load_domains(str(tmp_path)).features["label"].names == ["Alarm_Clock", "alarm clock", "dog"]


def test_names_composed_and_decomposed_are_one_name(tmp_path: Path) -> None:
    folders(tmp_path, ["Müll"], [unicodedata.normalize("NFC", "Käfer"), "b"])
    folders(tmp_path, ["plain"], [unicodedata.normalize("NFD", "Käfer"), "b"])
    data = load_domains(str(tmp_path))
    assert data.features["label"].names == ["Käfer", "b"]
    assert all(decode_image(image) for image in data["image"])  # the files are found under the names they have


def test_what_is_no_image_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders(tmp_path, ["day", "night"], ["cat"])
    (tmp_path / "day" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "day" / "thumbs.db").write_bytes(b"")
    folders(tmp_path / "night" / "cat", ["more"], ["x"])
    assert len(load_domains(str(tmp_path))) == 4
    for said in ("1 file(s) in day/cat that are no images: notes.txt", "thumbs.db", "1 folder(s) in night/cat: more"):
        assert said in caplog.text
