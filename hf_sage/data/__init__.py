"""Domain-labelled images: the embedded benchmark, folders, the Hub; decoding and leave-one-domain-out splits."""

from hf_sage.data.camelyon import CAMELYON17
from hf_sage.data.declared import DomainBedDataset, HubCopy, OnMismatch
from hf_sage.data.digits import EMBEDDED, load_embedded
from hf_sage.data.domainbed import DATASETS
from hf_sage.data.folder import load_image_folder
from hf_sage.data.images import ImageCollator, UnreadableImageError, decode_image, undecoded
from hf_sage.data.load import OnBadImage, load_domains
from hf_sage.data.splits import domain_counts, domain_names, hold_out, row_domains
from hf_sage.data.tensors import TensorDomains, preprocess
from hf_sage.data.transforms import TRANSFORMS, Transforms, image_transforms

__all__ = [
    "CAMELYON17",
    "DATASETS",
    "EMBEDDED",
    "TRANSFORMS",
    "DomainBedDataset",
    "HubCopy",
    "ImageCollator",
    "OnBadImage",
    "OnMismatch",
    "TensorDomains",
    "Transforms",
    "UnreadableImageError",
    "decode_image",
    "domain_counts",
    "domain_names",
    "hold_out",
    "image_transforms",
    "load_domains",
    "load_embedded",
    "load_image_folder",
    "preprocess",
    "row_domains",
    "undecoded",
]
