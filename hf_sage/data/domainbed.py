"""The five datasets of DomainBed, each declared once: what it should hold, where it comes from, whom to cite.

The counts are DomainBed's (Gulrajani and Lopez-Paz 2021, https://arxiv.org/abs/2007.01434). Where no list of classes
is declared, the number of classes is checked and their names are read from the data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

logger = logging.getLogger(__name__)

OnMismatch = Literal["error", "warn"]


@dataclass(frozen=True)
class HubCopy:
    """A copy on the Hub.

    Attributes:
        repo_id: Its repository.
        revision: The commit whose layout is known here; ``None`` where none is.
        splits: The splits that make up the whole.
        domain_column: The column of the domain.
    """

    repo_id: str
    revision: str | None
    splits: tuple[str, ...] = ("train",)
    domain_column: str = "domain"


@dataclass(frozen=True)
class DomainBedDataset:
    """What a dataset should hold.

    Attributes:
        name: DomainBed's name.
        folder: Its folder under DomainBed's data directory.
        domains: The folders of the domains, in the order of DomainBed's environments.
        class_count: The number of classes.
        total: Images in all.
        license: As its publisher or the card of the Hub copy states it.
        citation: The paper to cite.
        counts: Images by domain, where they are known.
        classes: The names of the classes, sorted, where they are known.
        hub: A copy on the Hub to rely on, if there is one.
        hint: Where downloads are known to differ.
    """

    name: str
    folder: str
    domains: tuple[str, ...]
    class_count: int
    total: int
    license: str
    citation: str
    counts: Mapping[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    hub: HubCopy | None = None
    hint: str = ""

    def differences(
        self, domains: Iterable[str], classes: Iterable[str], counts: Mapping[str, int] | None = None
    ) -> list[str]:
        """What was found and is not as declared, a sentence each.

        Args:
            domains: The names of the domains found.
            classes: The names of the classes found.
            counts: Images by domain; ``None`` where nobody counted (streams).
        """
        domains, classes = list(domains), list(classes)
        found = _set_differences("domain", domains, self.domains)
        if self.classes:
            found += _set_differences("class", classes, self.classes)
        elif len(classes) != self.class_count:
            found.append(f"{len(classes)} classes instead of {self.class_count}")
        if counts is None:
            return found
        for domain, expected in self.counts.items():
            if domain in counts and counts[domain] != expected:
                found.append(f"{counts[domain]:,} images in {domain!r} instead of {expected:,}")
        if not self.counts and sum(counts.values()) != self.total:
            found.append(f"{sum(counts.values()):,} images instead of {self.total:,}")
        return found

    def require(self, differences: list[str], where: str, on_mismatch: OnMismatch) -> None:
        """Raises or warns if anything differs.

        Args:
            differences: As `differences` gives them.
            where: The folder or repository they were found in.
            on_mismatch: ``"error"`` raises; ``"warn"`` goes on.

        Raises:
            ValueError: If something differs and nobody said to go on.
        """
        if not differences:
            return
        message = f"{where} is not {self.name} as DomainBed has it: {'; '.join(differences)}."
        if self.hint:
            message += f" {self.hint}"
        if on_mismatch == "error":
            raise ValueError(f"{message} Mend the data, or go on with what is there by on_mismatch='warn'.")
        logger.warning("%s Going on with what is there.", message)


def _set_differences(kind: str, found: list[str], declared: tuple[str, ...]) -> list[str]:
    missing = [name for name in declared if name not in found]
    extra = [name for name in found if name not in declared]
    return [f"{kind} {name!r} is missing" for name in missing] + [f"{kind} {name!r} is not declared" for name in extra]


_OFFICE_DOMAINS = ("Art", "Clipart", "Product", "Real World")
_TERRA_CLASSES = ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel")
_LOCATIONS = ("location_100", "location_38", "location_43", "location_46")  # sorted as DomainBed sorts: as text
_DOMAIN_NET_COUNTS = {
    "clipart": 48_129,
    "infograph": 51_605,
    "painting": 72_266,
    "quickdraw": 172_500,
    "real": 172_947,
    "sketch": 69_128,
}

DATASETS: dict[str, DomainBedDataset] = {
    dataset.name: dataset
    for dataset in (
        DomainBedDataset(
            name="PACS",
            folder="PACS",
            domains=("art_painting", "cartoon", "photo", "sketch"),
            class_count=7,
            classes=("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
            counts={"art_painting": 2_048, "cartoon": 2_344, "photo": 1_670, "sketch": 3_929},
            total=9_991,
            hub=HubCopy("flwrlabs/pacs", revision=None),
            license="unknown",
            citation="Li, Yang, Song, Hospedales: Deeper, Broader and Artier Domain Generalization. ICCV 2017. "
            "https://arxiv.org/abs/1710.03077",
            hint="The archive unpacks as `kfold`: rename that folder to `PACS`.",
        ),
        DomainBedDataset(
            name="VLCS",
            folder="VLCS",
            domains=("Caltech101", "LabelMe", "SUN09", "VOC2007"),
            class_count=5,
            classes=("bird", "car", "chair", "dog", "person"),
            counts={"Caltech101": 1_415, "LabelMe": 2_656, "SUN09": 3_282, "VOC2007": 3_376},
            total=10_729,
            license="unknown",
            citation="Fang, Xu, Rockmore: Unbiased Metric Learning: On the Utilization of Multiple Datasets and Web "
            "Images for Softening Bias. ICCV 2013.",
        ),
        DomainBedDataset(
            name="OfficeHome",
            folder="office_home",
            domains=_OFFICE_DOMAINS,
            class_count=65,
            counts=dict(zip(_OFFICE_DOMAINS, (2_427, 4_365, 4_439, 4_357), strict=True)),
            total=15_588,
            hub=HubCopy("flwrlabs/office-home", revision="d430d44779e929b335be368ab3456484e5de36bb"),
            license="fair-use-notice",
            citation="Venkateswara, Eusebio, Chakraborty, Panchanathan: Deep Hashing Network for Unsupervised Domain "
            "Adaptation. CVPR 2017. https://arxiv.org/abs/1706.07522",
            hint="The archive unpacks as `OfficeHomeDataset_10072016`: rename that folder to `office_home`.",
        ),
        DomainBedDataset(
            name="TerraIncognita",
            folder="terra_incognita",
            domains=_LOCATIONS,
            class_count=10,
            classes=_TERRA_CLASSES,
            total=24_788,
            license="CDLA-Permissive-1.0",
            citation="Beery, Van Horn, Perona: Recognition in Terra Incognita. ECCV 2018. "
            "https://arxiv.org/abs/1807.04975",
            hint="It is rebuilt from LILA's annotation files, and later downloads are known to give other counts.",
        ),
        DomainBedDataset(
            name="DomainNet",
            folder="domain_net",
            domains=tuple(_DOMAIN_NET_COUNTS),
            class_count=345,
            counts=_DOMAIN_NET_COUNTS,
            total=586_575,
            hub=HubCopy(
                "wltjr1007/DomainNet", revision="ee20570ae7a29c51571e55a9a17983f7625295d6", splits=("train", "test")
            ),
            license="other",
            citation="Peng, Bai, Xia, Huang, Saenko, Wang: Moment Matching for Multi-Source Domain Adaptation. "
            "ICCV 2019. https://arxiv.org/abs/1812.01754",
            hint="Take the cleaned clipart and painting archives, and delete the files that DomainBed's "
            "domain_net_duplicates.txt names.",
        ),
    )
}
"""DomainBed's name -> what the dataset should hold."""
