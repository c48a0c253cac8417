"""The five datasets of DomainBed, each declared once: what it should hold, where it comes from, whom to cite.

The counts are DomainBed's (Gulrajani and Lopez-Paz 2021, https://arxiv.org/abs/2007.01434). Where no list of classes
is declared, the number of classes is checked and their names are read from the data.
"""

from __future__ import annotations

from hf_sage.data.declared import DomainBedDataset, HubCopy

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
