"""Domain-labelled images: the embedded benchmark, folders, the Hub; decoding and leave-one-domain-out splits."""

from hf_sage.data.camelyon import CAMELYON17
from hf_sage.data.digits import EMBEDDED, load_embedded
from hf_sage.data.domainbed import DATASETS, DomainBedDataset, HubCopy
from hf_sage.data.folder import load_image_folder
from hf_sage.data.images import ImageCollator, UnreadableImageError, decode_image, undecoded
from hf_sage.data.load import OnBadImage, load_domains
from hf_sage.data.splits import domain_counts, domain_names, hold_out, row_domains
from hf_sage.data.tensors import TensorDomains, preprocess

__all__ = [
    "CAMELYON17",
    "DATASETS",
    "EMBEDDED",
    "DomainBedDataset",
    "HubCopy",
    "ImageCollator",
    "OnBadImage",
    "TensorDomains",
    "UnreadableImageError",
    "decode_image",
    "domain_counts",
    "domain_names",
    "hold_out",
    "load_domains",
    "load_embedded",
    "load_image_folder",
    "preprocess",
    "row_domains",
    "undecoded",
]
